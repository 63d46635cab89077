"""TRL's SFTTrainer, which wraps the model itself: `peft_config=DSLAConfig(level=...)` trains DSLA weights at that level."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsla_hf import DSLAConfig
from dsla_hf.cli.quickstart import train_tokenizer

trl = pytest.importorskip("trl", reason="needs TRL: pip install trl")

TEXTS = ["the answer is that a layer of the model reads its state and the window of the text"] * 8


@pytest.fixture
def make_trainer(tmp_path):
    from datasets import Dataset

    def make(checkpointing=False, **config):
        tokenizer = train_tokenizer(TEXTS, vocab_size=280)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
        base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=0, pad_token_id=1))
        names = ("activation_checkpointing", "gradient_checkpointing")  # transformers 5.18 renamed it; TRL's default is on
        options = {next(name for name in names if name in trl.SFTConfig.__dataclass_fields__): checkpointing}
        args = trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=4,
            learning_rate=1e-2,
            per_device_train_batch_size=2,
            logging_steps=1,
            max_length=32,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            **options,
        )
        config = DSLAConfig(task_type="CAUSAL_LM", window_size=8, **config)
        data = Dataset.from_dict({"text": TEXTS})
        return trl.SFTTrainer(base, args, train_dataset=data, processing_class=tokenizer, peft_config=config)

    return make


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_the_layers_of_the_level(make_trainer, checkpointing):
    trainer = make_trainer(checkpointing, level=2)
    model = trainer.model
    assert model.get_level() == 2 and model.peft_config["default"].conversion_order == [0, 1, 2, 3]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert all("dsla_" in name for name in moved) and {name.split(".layers.")[1][0] for name in moved} == {"0", "1"}


def test_without_a_level_it_is_refused_at_the_first_step(make_trainer):
    trainer = make_trainer(True)
    with pytest.raises(RuntimeError, match=r"nothing of DSLA can be trained at level 0: .* give DSLAConfig a level.* DSLATrainer"):
        trainer.train()
