// A few-step student in the browser: tokens, noise, steps and pixels. onnxruntime-web computes the graphs.
//
// The files beside this one are scripts too, since a page that is opened from a disk may not fetch: `student.js` sets
// `stepfold.student`, `graphs.js` and `runtime.js` fill `stepfold.files`.
"use strict";

const stepfold = { files: {}, student: null, sessions: null, backend: null };

/** The bytes of a packed file: base64 of gzip. */
stepfold.unpack = async function (name) {
  const text = atob(stepfold.files[name]);
  delete stepfold.files[name];
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
};

// ---- tokens: byte-level BPE behind an instruction ----

const WORDS = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;

/** Byte -> the letter that a vocabulary has for it: printable ones are themselves, the others follow from 256 on. */
const LETTERS = (() => {
  const letters = [];
  let next = 256;
  for (let byte = 0; byte < 256; byte++) {
    const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    letters.push(String.fromCodePoint(printable ? byte : next++));
  }
  return letters;
})();

/** Text -> its parts; every other one is one of `tokens`, as it stands in the text. */
function splitAt(tokens, text) {
  if (!tokens.length) return [text];
  const escaped = tokens.map((token) => token.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  return text.split(new RegExp(`(${escaped.join("|")})`, "u"));
}

/** A word in the vocabulary's letters -> ids: the pair that was merged first in training is merged first. */
function mergeWord(word, vocab, ranks) {
  const parts = [...word];
  for (;;) {
    let best = -1;
    let lowest = Infinity;
    for (let i = 0; i + 1 < parts.length; i++) {
      const rank = ranks.get(`${parts[i]} ${parts[i + 1]}`);
      if (rank < lowest) [best, lowest] = [i, rank];
    }
    if (best < 0) return parts.map((part) => vocab.get(part)).filter((id) => id !== undefined);
    parts.splice(best, 2, parts[best] + parts[best + 1]);
  }
}

/** A prompt -> the ids of its tokens, without padding. */
stepfold.tokenise = function (prompt) {
  const { instruction, length, vocab, merges, raw, normalised, begin } = stepfold.student.tokenizer;
  const known = (stepfold.known ??= {
    vocab: new Map(Object.entries(vocab)),
    ranks: new Map(merges.map((pair, rank) => [pair.join(" "), rank])),
  });
  const ids = [known.vocab.get(begin)];
  const text = instruction + prompt.toLowerCase().trim();
  splitAt(raw, text).forEach((piece, i) => {
    if (i % 2) return ids.push(known.vocab.get(piece));
    const plain = piece.replace(/[\s\S]*User Prompt:\s*/gu, "<instruction>").toLowerCase();
    splitAt(normalised, plain).forEach((part, j) => {
      if (j % 2) return ids.push(known.vocab.get(part));
      if (!part) return;
      for (const [word] of (part.startsWith(" ") ? part : " " + part).matchAll(WORDS)) {
        const letters = [...new TextEncoder().encode(word)].map((byte) => LETTERS[byte]);
        ids.push(...mergeWord(letters.join(""), known.vocab, known.ranks));
      }
    });
  });
  return ids.slice(0, length);
};

// ---- noise ----

/** Standard normal numbers that depend on seed and step alone: Box and Muller's, of a mixed counter. */
stepfold.noise = function (seed, step, count) {
  let state = Math.imul(seed ^ Math.imul(step + 1, 0x9e3779b9), 0x85ebca6b);
  const uniform = () => {
    state = (state + 0x9e3779b9) | 0;
    let mixed = Math.imul(state ^ (state >>> 16), 0x85ebca6b);
    mixed = Math.imul(mixed ^ (mixed >>> 13), 0xc2b2ae35);
    return (((mixed ^ (mixed >>> 16)) >>> 0) + 0.5) / 2 ** 32;
  };
  return Float32Array.from({ length: count }, () => {
    const radius = Math.sqrt(-2 * Math.log(uniform()));
    return radius * Math.cos(2 * Math.PI * uniform());
  });
};

// ---- sampling ----

/** The output of a graph for those of the inputs that it reads. */
async function run(session, inputs) {
  const names = session.inputNames;
  return session.run(Object.fromEntries(names.map((name) => [name, inputs[name]])));
}

/** A prompt's condition: embeddings and their mask. */
async function encode(prompt) {
  const { length, pad } = stepfold.student.tokenizer;
  const ids = stepfold.tokenise(prompt);
  const padded = new BigInt64Array(length).fill(BigInt(pad));
  const mask = new BigInt64Array(length);
  ids.forEach((id, i) => {
    padded[i] = BigInt(id);
    mask[i] = 1n;
  });
  const { Tensor } = stepfold.ort;
  const shape = [1, length];
  return run(stepfold.sessions.text, {
    ids: new Tensor("int64", padded, shape),
    ids_mask: new Tensor("int64", mask, shape),
  });
}

/** Consistency sampling of one image: its unit-variance latents, and its pixels [3, height, width] in [0, 1]. */
stepfold.sample = async function (prompt, steps, seed) {
  const { times, shape, guidance } = stepfold.student;
  const { Tensor } = stepfold.ort;
  const count = shape.reduce((product, side) => product * side, 1);
  const condition = await encode(prompt);
  const latent = (values) => new Tensor("float32", values, [1, ...shape]);
  let clean = null;
  for (const [i, t] of times[steps].entries()) {
    const fresh = stepfold.noise(seed, i, count);
    const x = clean ? clean.map((value, j) => Math.cos(t) * value + Math.sin(t) * fresh[j]) : fresh;
    const { F } = await run(stepfold.sessions.network, {
      ...condition,
      x: latent(x),
      t: new Tensor("float32", [t], [1]),
      guidance: new Tensor("float32", [guidance], [1]),
    });
    clean = x.map((value, j) => Math.cos(t) * value - Math.sin(t) * F.data[j]);
  }
  const { pixels } = await run(stepfold.sessions.decoder, { x: latent(clean) });
  return { latents: clean, pixels: pixels.data };
};

// ---- the page ----

/** Loads onnxruntime and the graphs; on the GPU where the browser has WebGPU, unless the address ends in ?wasm. */
stepfold.load = async function () {
  const module = new Blob([await stepfold.unpack("ort.mjs")], { type: "text/javascript" });
  const ort = (stepfold.ort = await import(URL.createObjectURL(module)));
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = await stepfold.unpack("ort.wasm");
  ort.env.logLevel = "error";
  const adapter = location.search === "?wasm" ? null : await navigator.gpu?.requestAdapter().catch(() => null);
  const graphs = {};
  for (const name of ["text", "network", "decoder"]) graphs[name] = await stepfold.unpack(`${name}.onnx`);
  const open = async (backend) => {
    const sessions = {};
    for (const [name, graph] of Object.entries(graphs)) {
      sessions[name] = await ort.InferenceSession.create(graph, { executionProviders: [backend] });
    }
    return Object.assign(stepfold, { sessions, backend });
  };
  if (!adapter) return open("wasm");
  return open("webgpu").catch(() => open("wasm"));
};

/** Pixels [3, height, width] onto a canvas. */
function show(canvas, pixels) {
  const { height, width } = stepfold.student;
  Object.assign(canvas, { height, width });
  const image = canvas.getContext("2d").createImageData(width, height);
  for (let i = 0; i < height * width; i++) {
    for (let channel = 0; channel < 3; channel++) {
      image.data[4 * i + channel] = Math.round(255 * pixels[channel * height * width + i]);
    }
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

stepfold.start = async function () {
  const at = (id) => document.getElementById(id);
  const { title, times } = stepfold.student;
  document.title = document.querySelector("h1").textContent = title;
  for (const steps of Object.keys(times)) at("steps").add(new Option(steps, steps));
  const sampleAll = async () => {
    const [prompt, steps, seed] = [at("prompt").value, Number(at("steps").value), Number(at("seed").value) >>> 0];
    at("sample").disabled = true;
    const began = performance.now();
    const canvases = [...document.querySelectorAll("canvas")];
    for (const [i, canvas] of canvases.entries()) {
      show(canvas, (await stepfold.sample(prompt, steps, seed + i)).pixels);
      canvas.ariaLabel = `${prompt}, seed ${seed + i}`;
      await new Promise(requestAnimationFrame);
    }
    const each = Math.round((performance.now() - began) / canvases.length);
    const where = stepfold.backend === "webgpu" ? "this machine's GPU" : "this machine's CPU";
    at("status").textContent = `${each} ms an image, ${steps} network call${steps > 1 ? "s" : ""} each, on ${where}.`;
    at("sample").disabled = false;
  };
  const guarded = (job) =>
    job().catch((error) => {
      at("status").textContent = `This did not work: ${error.message ?? error}`;
      at("sample").disabled = false;
    });
  at("form").addEventListener("submit", (event) => {
    event.preventDefault();
    guarded(sampleAll);
  });
  await guarded(async () => {
    await stepfold.load();
    await sampleAll();
  });
};
