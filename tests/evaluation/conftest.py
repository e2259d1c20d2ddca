"""A judge's folder with a real, tiny, random CLIPModel and a real tokenizer."""

from pathlib import Path

import pytest
import torch
from clips import save_clip
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, CLIPModel

from stepfold.evaluation.judge import Judge, load_judge

NAMES = ("red heart", "cat", "dog", "rocket", "pizza", "ghost", "snowman")
COLOURS = ("white", "black", "teal")
DIM = 6
TEXT_TOKENS = 12


def make_judge_folder(folder: Path) -> Path:
    """Everything that `load_judge` asks for, from seed 0."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    specials = ["<pad>", "<eos>", "<bos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{name} on {colour} background" for name in NAMES for colour in COLOURS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))

    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    text = tower | ids | {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": TEXT_TOKENS}
    vision = tower | {"image_size": 32, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM))
        for parameter in clip.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # the default scale gives nearly equal features for all inputs
    clip.save_pretrained(folder)
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "colours.txt").write_text("\n".join(COLOURS) + "\n")
    statistics = {"mean": torch.zeros(DIM), "covariance": torch.eye(DIM) / DIM, "diversity": torch.tensor(0.5)}
    save_file(statistics, folder / "features.safetensors")
    return folder


@pytest.fixture
def judge_folder(tmp_path: Path) -> Path:
    """A folder of its own, for tests that damage it."""
    return make_judge_folder(tmp_path)


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return load_judge(make_judge_folder(tmp_path_factory.mktemp("judge")), "cpu")


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny CLIP."""
    return save_clip(tmp_path_factory.mktemp("clip"))
