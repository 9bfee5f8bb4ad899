"""The section "Use" of a model card: how this program, transformers or peft, and other engines take the folder.

THIS_FOLDER in a line is the folder of the card. The lines for other engines are those of their own documentation. They
were not run with an exported model, and the card says so.
"""

from __future__ import annotations

import json
import re
import shlex


def use_section(
    base: str,
    architecture: str | None,
    public_code: str | None,
    is_adapter: bool,
    prompt: str,
    template: str = "",
) -> str:
    """Markdown that generates text with the folder of an export.

    `architecture`: as config.json has it; `public_code`: the hub repository with its modelling code; None: unknown.
    `base`: the model under an adapter. `template`: settings that say how the run wrote its prompts.
    """
    code, engines = OTHERS.get(architecture or "", ("", ""))
    if is_adapter:
        parts = [ADAPTER, PEFT, code] if public_code else [ADAPTER]
    else:
        parts = [MERGED, TRANSFORMERS, code, engines] if public_code else [MERGED, engines]
    words = {
        "PROMPT": prompt,
        "PUBLIC_CODE": public_code or "the public code",
        " TEMPLATE": template,
        '"BASE"': json.dumps(base),
        "BASE": shlex.quote(base).replace("`", ""),
    }
    text = "\n\n".join(part for part in parts if part)
    return re.sub("|".join(words), lambda found: words[found[0]], text)


MERGED = """With laddpo:

```bash
laddpo generate model=THIS_FOLDER TEMPLATE prompt="PROMPT"
```"""

TRANSFORMERS = """With transformers 4:

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER", trust_remote_code=True)
model = AutoModel.from_pretrained("THIS_FOLDER", trust_remote_code=True, torch_dtype="auto")
```"""

ADAPTER = """With laddpo, as it is, or merged into its base for other programs:

```bash
laddpo generate model=BASE adapter.path=THIS_FOLDER TEMPLATE prompt="PROMPT"
laddpo export model=BASE adapter.path=THIS_FOLDER TEMPLATE
```"""

PEFT = """With peft and transformers 4:

```python
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("BASE", trust_remote_code=True)
base = AutoModel.from_pretrained("BASE", trust_remote_code=True, torch_dtype="auto")
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
```"""

LLADA_CODE = """`trust_remote_code=True` downloads the code of `PUBLIC_CODE` and executes it. laddpo never does. That \
code is written for transformers 4 (4.57.1 loads it). transformers 5 refuses it for a missing `all_tied_weights_keys` \
(https://github.com/ML-GSAI/LLaDA/issues/130)."""

LLADA_ENGINES = """Other programs that know this architecture, untested here:

- The original sampler is `generate` in `generate.py` of https://github.com/ML-GSAI/LLaDA. It takes the model above.
- llama.cpp: `python convert_hf_to_gguf.py THIS_FOLDER --outfile model.gguf`, then `llama-diffusion-cli -m model.gguf \
-p "PROMPT" -ub 512 --diffusion-block-length 32 --diffusion-steps 256`
- Fast-dLLM, in its folder `v1/llada`: `accelerate launch eval_llada.py --tasks gsm8k --num_fewshot 5 \
--confirm_run_unsafe_code --model llada_dist \
--model_args model_path=THIS_FOLDER,gen_length=256,steps=8,block_length=32,threshold=0.9`
- dInfer, in Python: `dinfer.model.LLaDAModelLM.from_pretrained("THIS_FOLDER", torch_dtype=torch.bfloat16, \
init_device="cuda:0")`, under its `BlockWiseDiffusionLLM`"""

PUBLIC_CODE = """`trust_remote_code=True` downloads the code of `PUBLIC_CODE` and executes it. laddpo never does. That \
code is written for transformers 4, and was not run here."""

LLAMA_CPP = """llama.cpp knows this architecture, untested here: `python convert_hf_to_gguf.py THIS_FOLDER --outfile \
model.gguf`, then `llama-diffusion-cli -m model.gguf -p "PROMPT" -ub 512 """

OTHERS = {
    "LLaDAModelLM": (LLADA_CODE, LLADA_ENGINES),
    "ILLaDAForCausalLM": (PUBLIC_CODE, ""),
    "DreamModel": (PUBLIC_CODE, f"{LLAMA_CPP}--diffusion-eps 0.001 --diffusion-algorithm 3 --diffusion-steps 256`"),
    "LLaDAMoEModelLM": ("", f"{LLAMA_CPP}--diffusion-block-length 32 --diffusion-steps 256`"),
    "LLaDAMoEModel": ("", f"{LLAMA_CPP}--diffusion-block-length 32 --diffusion-steps 256`"),
    "LLaDA2MoeModelLM": (PUBLIC_CODE, ""),
    "SDARForCausalLM": (PUBLIC_CODE, ""),
}  # by architecture: a note on its public code, and its engines
