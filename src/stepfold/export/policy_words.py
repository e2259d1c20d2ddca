"""How a README says that a policy student is used."""

import json

from stepfold.students.card import Card

OF_POLICY = """The network gives {nodes} velocities at a time, of which a policy makes its path. `stepfold sample
{name}` follows it, in {steps}. In diffusers a scheduler of stepfold does so, at these levels alone.

"""
LOAD_POLICY = """pipe = {pipeline}.from_pretrained({name}, dtype=torch.{dtype})
pipe.scheduler = PolicyScheduler.from_pretrained({name}, subfolder="policy_scheduler")"""
ONE_STEP = """

For diffusers without stepfold, the one step becomes a stock network:

```
stepfold export {name} --to pipeline --steps 1
```"""


def of_policy(card: Card, name: str, template: str, made: str) -> str:
    """The README's use of a policy student: its template for code, and what the pipeline's result is called."""
    ((steps, call),) = card.calls.items()
    code = template.format(
        classes=f"{card.pipeline}\nfrom stepfold.api import PolicyScheduler",
        loading=LOAD_POLICY.format(
            pipeline=card.pipeline, name=json.dumps("WHOLE" if card.lora_rank else name), dtype=card.loaded_dtype
        ),
        prompt=json.dumps(card.example, ensure_ascii=False),
        arguments="\n".join(f"    {key}={value!r}," for key, value in call.items()),
        result=made,
        output=card.output,
    )
    assert card.recipe.policy is not None, "the caller checks"
    said = OF_POLICY.format(nodes=card.recipe.policy.nodes, name=name, steps=f"{steps} step{'s' * (steps > 1)}")
    if card.lora_rank:
        said += f"A whole pipeline comes first: `stepfold export {name} --to pipeline --out WHOLE`.\n\n"
    return said + code + ONE_STEP.format(name=name) * (steps == 1)
