"""`generate` against torch's greedy text, and one line for every way in which it can be called wrongly."""

import sys

import pytest

from mdrl_jax.main import main
from mdrl_jax.model import tokens

pytestmark = pytest.mark.usefixtures("fast_compile")

PROMPT = "Once upon a time, "


@pytest.fixture
def model(shared):
    return shared / "models" / "tinystories-656k"


@pytest.fixture(scope="module")
def greedy(shared):
    """Prompt ids and sixty new greedy ids by torch, and their text."""
    torch = pytest.importorskip("torch", reason="the oracle is torch")
    transformers = pytest.importorskip("transformers")
    folder = shared / "models" / "tinystories-656k"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    whole = oracle.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60)
    new = whole[0, ids.shape[1] :].tolist()
    return ids[0].tolist(), new, tokenizer.decode(new, skip_special_tokens=True)


def call(capsys, *flags):
    status = main(["mdrl", *flags])
    out, err = capsys.readouterr()
    return status, out, err


def test_greedy_text_equals_torch(model, greedy, capsys):
    _, new, text = greedy
    flags = [f"--model={model}", f"--prompt={PROMPT}", "--temperature=0", "--max_new_tokens=60"]
    status, out, err = call(capsys, "generate", *flags)
    assert (status, out, err) == (0, text + "\n", "")
    assert len(new) == 60 and len(text.split()) > 30


def test_prompt_ids_print_ids(model, greedy, capsys):
    ids, new, _ = greedy
    flags = [f"--model={model}", f"--prompt_ids={','.join(map(str, ids))}", "--temperature=0", "--max_new_tokens=60"]
    status, out, err = call(capsys, "generate", *flags)
    assert (status, out.split(), err) == (0, [str(i) for i in new], "")


@pytest.mark.parametrize(("terminal", "shown"), [(True, "a\\x1b[31mb\\u202e\n"), (False, "a\x1b[31mb\u202e\n")])
def test_only_a_terminal_gets_escapes_for_control_characters(model, terminal, shown, capsys, monkeypatch):
    tokenizer = tokens.load_tokenizer(model)
    monkeypatch.setattr(tokenizer, "decode", lambda *_, **__: "a\x1b[31mb\u202e")
    monkeypatch.setattr(tokens, "load_tokenizer", lambda _: tokenizer)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    status, out, err = call(capsys, "generate", f"--model={model}", "--prompt=a", "--max_new_tokens=1")
    assert (status, out, err) == (0, shown, "")


def test_seed_decides_the_draw(model, capsys):
    flags = [f"--model={model}", "--prompt_ids=1,2,3", "--max_new_tokens=12"]
    first, again, other = (call(capsys, "generate", *flags, f"--seed={seed}") for seed in (0, 0, 1))
    assert first == again != other
    assert first[0] == 0 and len(first[1].split()) <= 12


WRONG = {
    "missing folder": (["--model=nowhere", "--prompt=a"], "model folder nowhere does not exist"),
    "no source": (["--prompt=a"], "--model"),
    "both sources": (["--model=DIR", "--workdir=w", "--stage=math", "--prompt=a"], "--workdir"),
    "no stage": (["--workdir=w", "--prompt=a"], "--stage is missing"),
    "missing run": (["--workdir=nowhere", "--stage=math", "--prompt=a"], "nowhere"),
    "both prompts": (["--model=DIR", "--prompt=a", "--prompt_ids=1"], "either --prompt or --prompt_ids"),
    "no prompt": (["--model=DIR"], "either --prompt or --prompt_ids"),
    "words for ids": (["--model=DIR", "--prompt_ids=one"], "'one' is not a list of numbers"),
    "empty ids": (["--model=DIR", "--prompt_ids="], "not a list of numbers"),
    "ids beyond": (["--model=DIR", "--prompt_ids=1,2048"], "ids outside 0 to 2047"),
    "negative ids": (["--model=DIR", "--prompt_ids=-1"], "ids outside 0 to 2047"),
    "too long": (["--model=DIR", "--prompt_ids=1,2", "--max_new_tokens=511"], "exceed the model's limit of 512 tokens"),
    "nothing new": (["--model=DIR", "--prompt=a", "--max_new_tokens=0"], "max_new_tokens"),
    "frozen": (["--model=DIR", "--prompt_ids=1,2", "--max_new_tokens=4", "--temperature=1e-38"], "logits, divided by"),
    "cold": (["--model=DIR", "--prompt=a", "--temperature=-1"], "temperature"),
    "warm": (["--model=DIR", "--prompt=a", "--temperature=hot"], "temperature"),
    "top_k": (["--model=DIR", "--prompt=a", "--top_k=-1"], "top_k"),
    "top_p": (["--model=DIR", "--prompt=a", "--top_p=1.5"], "top_p=1.5 is not valid"),
    "unknown flag": (["--model=DIR", "--prompt=a", "--temprature=1"], "temprature"),
    "stray word": (["--model=DIR", "--prompt=a", "more"], "'more' is not understood"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_call_ends_in_one_line(case, model, capsys):
    flags, words = WRONG[case]
    status, out, err = call(capsys, "generate", *(flag.replace("DIR", str(model)) for flag in flags))
    assert status == 2 and out == ""
    assert err.startswith("mdrl: error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert words in err


def test_unknown_command_ends_in_one_line(capsys):
    status, out, err = call(capsys, "generat", "--model=nowhere")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "'generat' is not known" in err and "generate" in err
