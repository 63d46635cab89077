"""Answers that are generated and judged: what is asked, the rules, the measures by hand, resuming, and the page."""

import json
import lzma
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from scripts import EVAL, loaded_script
from transformers import LlamaConfig, LlamaForCausalLM

from dsla_hf import DSLAConfig
from dsla_hf.cli.quickstart import train_tokenizer
from dsla_hf.inference.graph import PlainRecording

LAYERS, KV_HEADS = 2, 2
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def answers():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EVAL))
        with loaded_script("answers.py") as module:
            yield module


@pytest.fixture(scope="module")
def asked(answers):
    with loaded_script("asked.py") as module:
        yield module


def letters_tokenizer():
    """Nearly a token for each letter; without a chat template."""
    return train_tokenizer(["aa"], vocab_size=260)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with an adapter, and held-out texts."""
    folder = tmp_path_factory.mktemp("answers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": LAYERS, "vocab_size": 260, "max_position_embeddings": 2048}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=KV_HEADS, bos_token_id=None, eos_token_id=0, pad_token_id=1)
    config.initializer_range = 0.3
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder / "model")
    letters_tokenizer().save_pretrained(folder / "model")
    plan = DSLAConfig(conversion_unit="head", window_size=16, task_type="CAUSAL_LM")
    get_peft_model(base, plan).save_pretrained(folder / "adapter")
    data = folder / "data"
    data.mkdir()

    def sentences(kind):
        return " ".join(f"Here the {kind} says of number {i} that {i * i} is its square." for i in range(90))

    with lzma.open(data / "novels_val.jsonl.xz", "wt") as file:
        file.writelines(json.dumps({"text": sentences(f"novel {i}")}) + "\n" for i in range(5))
    return folder


def run(answers, folder, out, *options):
    words = [
        str(folder / "model"),
        str(folder / "data"),
        "--adapter",
        str(folder / "adapter"),
        "--out",
        str(out),
        "--tiny",
        "--probes",
        "2",
    ]
    answers.main([*words, *options])
    return json.loads(Path(out).read_text())


@pytest.fixture(scope="module")
def measured(answers, folder):
    return run(answers, folder, folder / "rows.json", "--kept", "3,0")


def test_rows_are_the_floor_and_the_levels(measured):
    assert [(row["kept"], row["level"], row["of"]) for row in measured["rows"]] == [(4, 0, 4), (3, 1, 4), (0, 4, 4)]
    assert measured["arm"] == "adapter" and measured["training"] is None and len(measured["reference"]) == 8
    for row in measured["rows"]:
        assert 0 <= row["agreement_long"] <= 1 and row["kl_long"] >= 0 and len(row["choice_found"]) == 4
        assert {"code_400", "tracking_400", "format_drawn", "bytes_8k"} <= row.keys()
    floor, _, whole = measured["rows"]
    assert whole["agreement_long"] < floor["agreement_long"] and whole["kl_long"] > floor["kl_long"]


def test_what_is_asked_is_the_same_each_time_and_of_its_length(asked, folder):
    tokenizer = letters_tokenizer()
    counts = asked.Counts(5, 6, 2, 1, 3, (1400, 1600))
    one, two = (asked.make_asked(tokenizer, folder / "data", counts, 0) for _ in range(2))
    assert [x.input_ids for x in one] == [x.input_ids for x in two]
    assert [x.input_ids for x in one] != [x.input_ids for x in asked.make_asked(tokenizer, folder / "data", counts, 1)]
    kinds = [x.kind for x in one]
    assert [kinds.count(kind) for kind in ("short", "long", "format", "choice")] == [5, 6, 3 * len(asked.RULES), 12]
    assert all(len(x.input_ids) == x.length for x in one if x.length)
    text = tokenizer.decode(one[0].input_ids, skip_special_tokens=True)
    assert text == f"Question: {asked.QUESTIONS[0]}\nAnswer:"


def test_the_right_sentence_alone_stands_in_the_text(asked, folder):
    tokenizer = letters_tokenizer()
    chosen = [x for x in asked.make_asked(tokenizer, folder / "data", asked.Counts(1, 1, 1, 1, 4, (1400,)), 0) if x.kind == "choice"]
    for begin in range(0, 16, 4):
        turns = chosen[begin : begin + 4]
        assert [x.letter for x in turns] == list("ABCD") and len({x.question for x in turns}) == 1
        right = set()
        for one in turns:
            document, _, question = tokenizer.decode(one.input_ids).partition("\n\nWhich of these")
            options = {line[0]: line[3:] for line in question.splitlines() if line[1:3] == ". "}
            assert [letter for letter, option in options.items() if option in document] == [one.letter]
            right.add(options[one.letter])
        assert len(right) == 1


def test_a_chat_template_is_asked_in(asked, folder):
    tokenizer = letters_tokenizer()
    tokenizer.chat_template = TEMPLATE
    text = tokenizer.decode(asked.make_asked(tokenizer, folder / "data", asked.Counts(1, 1, 1, 1, 1, (1400,)), 0)[0].input_ids)
    assert text.endswith(f"<user>{asked.QUESTIONS[0]}\n<assistant>")
    tokenizer.chat_template = "{{ 'nothing' }}"
    with pytest.raises(ValueError, match="does not show what the user writes"):
        asked.Template(tokenizer)


@pytest.mark.parametrize(
    ("rule", "met", "missed"),
    [
        ("json", '```json\n{"name": "a", "colour": 1}\n```', '{"name": "a"}'),
        ("json", '{"colour": [], "name": ""}', 'Here: {"name": "a", "colour": 1}'),
        ("lines", "salt\nwave\n\nfish\nship", "salt\nwave\nfish"),
        ("lines", "- salt\n- wave\n- fish\n- ship", "salt water\nwave\nfish\nship"),
        ("numbered", "1. One is.\n2. Two is.\n3. Three is.", "1. One is.\n2. Two is.\n3. Three is.\nThat is all."),
        ("numbered", "1) a\n2) b\n3) c", "1. a\n3. b\n2. c"),
        ("word", "Waves.", "Blue waves"),
        ("capitals", "THE SEA IS WIDE.", "The sea is wide."),
        ("capitals", "A 1!", "12"),
        ("begins", '"In the end it froze."', "It froze in the end."),
        ("sentence", "It is 3.5 miles wide.", "It is wide. It is deep."),
        ("yes or no", "Yes.", "Yes, there is."),
    ],
)
def test_rules(rule, met, missed, asked):
    holds = asked.RULES[rule].holds
    assert holds(met) and not holds(missed)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(C). It says so", "C"),
        ("The answer is D.", "D"),
        ("Answer: A", "A"),
        ("Because of it", None),
        ("A lot", "A"),
        ("", None),
    ],
)
def test_letters(text, letter, asked):
    assert asked.letter_of(text) == letter


def test_answers_differ_first_where_they_differ(answers):
    assert answers.first_difference([1, 2, 3], [1, 2, 3]) is None
    assert answers.first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert answers.first_difference([1, 2], [1, 2, 3]) == 2


def test_batches_hold_every_prompt_once_and_those_of_like_lengths_together(answers):
    prompts = [[0] * length for length in (3, 900, 5, 900, 1000, 900, 2400)]
    batches = answers.in_batches(prompts, 3000)
    assert sorted(place for batch in batches for place in batch) == list(range(7))
    assert batches == [[0, 2], [1, 3, 5], [4], [6]]


def test_agreement_and_kl_are_those_of_the_logits(answers, folder):
    """Beside each prompt and answer read alone, without padding."""
    tokenizer = letters_tokenizer()
    model = LlamaForCausalLM.from_pretrained(folder / "model").eval()
    torch.manual_seed(1)
    other = LlamaForCausalLM(model.config).eval()
    prompts, given = [[5, 6, 7], [8, 9, 10, 11, 12]], [[13, 14, 15], [16]]

    def teacher(ids, mask, count):
        return answers.last_logits(other, ids, mask, count)

    agreed, kl = answers.along(answers.Speaker(model, tokenizer), teacher, prompts, given)
    for prompt, answer, same, found in zip(prompts, given, agreed, kl, strict=True):
        with torch.no_grad():
            own, its = (m(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] for m in (model, other))
        assert same == (own.argmax(-1) == torch.tensor(answer)).tolist()
        p, q = (torch.log_softmax(x / answers.TEMPERATURE, -1) for x in (its, own))
        assert found == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)


def test_greedy_answers_agree_with_themselves_and_end_at_their_end(answers, folder):
    tokenizer = letters_tokenizer()
    model = LlamaForCausalLM.from_pretrained(folder / "model").eval()
    speaker = answers.Speaker(model, tokenizer)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [20] * 40]
    given = speaker.answers(prompts, 5)
    agreed, kl = answers.along(speaker, lambda *of: answers.last_logits(model, *of), prompts, given)
    assert all(all(one) for one in agreed) and max(kl) == pytest.approx(0, abs=1e-6)
    assert speaker._ended([4, 0, 5]) == [4, 0] and speaker._ended([4, 5]) == [4, 5]
    drawn = [speaker.answers(prompts, 5, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_interrupted_run_goes_on_behind_its_last_level(answers, folder, measured, tmp_path, monkeypatch):
    out = tmp_path / "rows.json"
    out.write_text(json.dumps(measured | {"rows": measured["rows"][:2]}))
    monkeypatch.setattr(answers.Reference, "answers", None)  # which are in the file
    again = run(answers, folder, out, "--kept", "3,0")
    timed = {"seconds"}
    assert [{k: v for k, v in row.items() if k not in timed} for row in again["rows"]] == [
        {k: v for k, v in row.items() if k not in timed} for row in measured["rows"]
    ]
    monkeypatch.setattr(answers, "load_adapter", None)
    with pytest.raises(ValueError, match="another seed"):
        run(answers, folder, out, "--seed", "1")
    with pytest.raises(ValueError, match="another parts"):
        run(answers, folder, out, "--without", "codes")


def test_a_run_cut_before_its_first_level_has_kept_the_reference(answers, folder, measured, tmp_path, monkeypatch):
    def cut(*of):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(answers, "agreement", cut)
        with pytest.raises(KeyboardInterrupt):
            run(answers, folder, tmp_path / "rows.json", "--kept", "0")
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["rows"] == [] and found["reference"] == measured["reference"]
    with pytest.raises(ValueError, match="no file has level 0"):
        answers.join([tmp_path / "rows.json"])
    monkeypatch.setattr(answers.Reference, "answers", None)  # which are in the file
    assert len(run(answers, folder, tmp_path / "rows.json", "--kept", "0")["rows"]) == 2


@pytest.mark.parametrize("level", [0, 1, 4])
def test_recorded_steps_answer_as_generate_does(answers, folder, level):
    """What a GPU runs: levels with whole and divided layers, prompts of several lengths in a batch, greedy and drawn."""
    tokenizer = letters_tokenizer()
    model = answers.load_adapter(str(folder / "model"), str(folder / "adapter"), "float32").eval()
    answers.set_level(model, level)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [20, 21] * 20, [30, 31, 32] * 250]
    speaker = answers.Speaker(model, tokenizer)
    usual = speaker.answers(prompts, 5)
    speaker.decoder = answers.GraphDecoder(model, record=PlainRecording)
    assert speaker.answers(prompts, 5) == usual
    drawn = [speaker.answers(prompts, 5, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    recorder = speaker.decoder.recorder
    assert recorder.replayed > 0 and recorder.plain == 0 and recorder.reason is None


def test_parts_can_be_left_out(answers, folder, tmp_path):
    rows = run(answers, folder, tmp_path / "rows.json", "--without", "codes", "agreement", "formats", "--kept", "0")["rows"]
    assert "choice" in rows[1] and not {"agreement_long", "format", "code_400"} & rows[1].keys()
    with pytest.raises(SystemExit):
        run(answers, folder, tmp_path / "none.json", "--without", *answers.PARTS)


def test_the_page_has_the_figures(answers, folder, measured, tmp_path):
    pytest.importorskip("matplotlib")
    other = json.loads(json.dumps(measured)) | {"arm": "window"}
    (tmp_path / "window.json").write_text(json.dumps(other))
    docs, site = tmp_path / "docs", tmp_path / "mkdocs.yml"
    site.write_text("nav:\n  - Measured:\n      - recipe.md\n      - measured/heads.md\n  - API: api.md\n")
    for _ in range(2):
        answers.main(["page", str(folder / "rows.json"), str(tmp_path / "window.json"), "--results", str(tmp_path), "--docs", str(docs)])
    joined = json.loads((tmp_path / "answers.json").read_text())
    assert [row["arm"] for row in joined["rows"]] == ["floor", "adapter", "adapter", "window", "window"] and "reference" not in joined
    floor, first = joined["rows"][:2]
    assert first["agreement_share_long"] == pytest.approx(first["agreement_long"] / floor["agreement_long"])
    assert floor["agreement_share_short"] == 1.0 and floor["format_lost"] == 0
    text = (docs / "measured" / "answers.md").read_text()
    assert site.read_text().splitlines()[3:] == ["      - measured/heads.md", "      - measured/answers.md", "  - API: api.md"]
    assert f"| adapter | 3 | {first['agreement_long']:.4f} |" in text and "(../images/answers.png)" in text
    assert "| code, 400 | tracking, 400 |" in text and str(tmp_path) not in text + json.dumps(joined)
    assert (docs / "images" / "answers.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_says_how_arms_were_trained_where_that_is_known(answers, measured, monkeypatch):
    monkeypatch.setattr(answers, "how_trained", lambda training: f"trained: {', '.join(training)}")
    assert answers.trained({"heads": {"steps": 1}, "mine": None}) == "trained: heads\n\n" and answers.trained({"mine": None}) == ""
    joined = {**measured, "dtype": "float32", "training": {"heads": {"steps": 1}}, "rows": measured["rows"][:1]}
    monkeypatch.setattr(answers, "agreement_table", lambda *given: "")
    monkeypatch.setattr(answers, "formats_table", lambda *given: "")
    assert "trained: heads\n\n`floor` is level 0 in float32" in answers.page_text(joined, "answers")


def test_what_is_kept_is_of_what_level_0_got_right(answers, measured, tmp_path):
    part = json.loads(json.dumps(measured))
    part["rows"][0]["choice_found"], part["rows"][1]["choice_found"] = "1101", "0110"
    (tmp_path / "a.json").write_text(json.dumps(part))
    row = answers.join([tmp_path / "a.json"])["rows"][1]
    assert (row["choice_lost"], row["choice_gained"]) == (2, 1) and row["choice_kept"] == pytest.approx(1 / 3)


def test_files_that_do_not_compare_are_refused(answers, measured, tmp_path):
    def written(name, **changes):
        (tmp_path / name).write_text(json.dumps(measured | changes))
        return tmp_path / name

    one = written("one.json")
    with pytest.raises(ValueError, match="each arm needs one file"):
        answers.join([one, one])
    with pytest.raises(ValueError, match="differ in reference"):
        answers.join([one, written("two.json", arm="other", reference=[])])
    with pytest.raises(ValueError, match="no file has level 0"):
        answers.join([written("three.json", rows=measured["rows"][1:])])


def test_texts_that_are_missing_are_named(answers, folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match="novels_val"):
        run(answers, tmp_path, tmp_path / "rows.json", "--kept", "0")
    assert not (tmp_path / "rows.json").exists()


def test_prompts_fit_the_context_and_are_shared_out(answers, folder):
    words = [str(folder / "model"), "data", "--adapter", "a", "--out", "o.json"]
    sizes = answers.sizes_of(answers.parse([*words, "--prompts", "20"]))
    longest = max(sizes.counts.lengths)
    assert longest + answers.FORMAT_TOKENS <= 2048 and max(sizes.code_lengths) < 2048
    assert (sizes.counts.short, sizes.counts.long, sizes.counts.formats_long) == (10, 10, 1)
