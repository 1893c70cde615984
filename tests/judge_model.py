"""A real language model, made in seconds, that answers a judge's questions with numbers.

    python -m tests.judge_model FOLDER [PREFERENCES]

It learns to give grades for the shipped template: 80 to chosen (or right) responses, 20 to rejected (or wrong) ones.
The responses come from a file with prompt, chosen and rejected, or from the tiny world. It serves to test the path from
a judge's client through a real server to a real model; its judgement has no meaning.
"""

import json
import random
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM

from dnpo.data.tinyworld import TinyWorld
from dnpo.judges.asked.questions import SHIPPED, Template
from dnpo.policy.tokenizer import train_tokenizer
from dnpo.records import Prompt

# like TEMPLATE of dnpo.tokenizer, with an end after every turn
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|user|>' if m['role'] != 'assistant' else '<|assistant|>' }}"
    "{{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def examples(preferences: Path | None, count: int) -> list[tuple[str, str, int]]:
    """Prompt, response and grade."""
    if preferences is not None:
        rows = [json.loads(line) for line in preferences.read_text().splitlines()]
        found = [(r["prompt"], r[side], grade) for r in rows for side, grade in (("chosen", 80), ("rejected", 20))]
    else:
        world, _ = TinyWorld(train=count, validation=12, test=12).read()
        rows_ = world["train"]
        found = [(p.messages[-1]["content"], p.human, 80) for p in rows_]
        found += [(p.messages[-1]["content"], q.human, 20) for p, q in pairwise(rows_)]
    random.Random(0).shuffle(found)
    return found[:count]


def make(folder: Path, preferences: Path | None = None, steps: int = 80, count: int = 1200) -> None:
    """Train tokenizer and model, and save them as a transformers folder."""
    torch.manual_seed(0)
    template = Template(SHIPPED / "score.yaml", "score")
    rows = examples(preferences, count)
    chats = [(template.messages([{"role": "user", "content": p}], r), grade) for p, r, grade in rows]
    texts = [Prompt(str(i), messages, str(grade)) for i, (messages, grade) in enumerate(chats[:300])]
    tokenizer: Any = train_tokenizer(texts, 1500)
    tokenizer.chat_template = CHAT
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 160,
        "max_position_embeddings": 4096,
    }
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **special))
    optimizer = AdamW(model.parameters(), lr=3e-3)
    encoded = []
    for messages, grade in chats:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer(str(grade), add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(ids) <= 700:
            encoded.append(
                (ids[-300:], answer)
            )  # the end of the question suffices to tell the grade, and is cheaper to train on
    for step in range(steps):
        batch = [encoded[(step * 8 + i) % len(encoded)] for i in range(8)]
        longest = max(len(p) + len(a) for p, a in batch)
        ids_BT = torch.full((len(batch), longest), tokenizer.pad_token_id)
        labels_BT = torch.full((len(batch), longest), -100)
        for row, (p, a) in enumerate(batch):
            ids_BT[row, : len(p) + len(a)] = torch.tensor(p + a)
            labels_BT[row, len(p) : len(p) + len(a)] = torch.tensor(a)
        optimizer.zero_grad()
        loss = model(input_ids=ids_BT, labels=labels_BT).loss
        loss.backward()
        optimizer.step()
    print(f"loss of the last step {float(loss.detach()):.3f}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
