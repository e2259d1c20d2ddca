// node svg.mjs PACKAGES_FOLDER: reads {name: svg} from standard input, writes {name: PNG in base64} to standard output.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { resolve } from "node:path";

const { Resvg } = createRequire(resolve(process.argv[2], "package.json"))("@resvg/resvg-js");
const drawn = {};
for (const [name, svg] of Object.entries(JSON.parse(readFileSync(0, "utf8")))) {
  drawn[name] = new Resvg(svg, { fitTo: { mode: "width", value: 136 } }).render().asPng().toString("base64");
}
process.stdout.write(JSON.stringify(drawn));
