r"""Public data sets by name: where the files are, what the prompt asks, what is checked, and by which reward.

A config takes a preset with `c.domains.math.preset = "gsm8k"` and may override any of its fields. The most common
override is local files of the same layout: `c.domains.math.files = ("gsm8k/*.jsonl",)`. The wording of the prompts was
chosen for this package [chosen]: each asks for the form of reply that its reward can read. `reply`, where the data set
has solutions, is a demonstration in this form.
"""

import dataclasses

from mdrl_jax.domains.base import SourceConfig
from mdrl_jax.errors import UserError

MATH = "{question}\n\nReason step by step, and put the final answer within \\boxed{{}}."
CODE = "{task}\n\nWrite it in Python, in one ```python block. It has to pass tests such as this one:\n{example}"
CHOICE = "{question}\n\n{options}\n\nReply with the letter of the right option, and nothing else."
CONTEST = (
    "{task}\n\nWrite a Python program that reads from standard input and prints to standard output, in one ```python "
    "block."
)
STUB = (
    "Complete this Python program. Reply with the whole of it, the given part included, in one ```python block."
    "\n\n```python\n{stub}```"
)
LAST_LINE = "{task}\n\n```python\n{stub}```\n\nReply with the missing last line of this function, and nothing else."
BOXED = "{solution}\n\nThe final answer is \\boxed{{{answer}}}."
PROGRAM = "```python\n{code}\n```"
ANSWERS = {"answer": "answer"}
SETUP = {"tests": "tests", "setup": "setup"}
LETTER = {"answer": "letter", "choices": "choices"}
KEPT = {"constraints": "constraints"}

MULTIPLE_CHOICE = SourceConfig(
    fields="choices", prompt=CHOICE, check=LETTER, reply="{letter}", reward="mdrl_jax.rewards.qa:choice"
)
COMPETITION = SourceConfig(fields="math", prompt=MATH, check=ANSWERS, reply=BOXED, reward="math")

PRESETS: dict[str, SourceConfig] = {
    "gsm8k": SourceConfig(
        files=("hub:openai/gsm8k:main:train",),
        test_files=("hub:openai/gsm8k:main:test",),
        fields="gsm8k",
        prompt=MATH,
        check=ANSWERS,
        reply=BOXED,
        reward="math",
    ),
    "math": dataclasses.replace(
        COMPETITION,
        files=("hub:DigitalLearningGmbH/MATH-lighteval:train",),
        test_files=("hub:DigitalLearningGmbH/MATH-lighteval:test",),
    ),
    "openr1_math": dataclasses.replace(COMPETITION, files=("hub:open-r1/OpenR1-Math-220k:train",), fields="openr1"),
    "mbpp": SourceConfig(
        files=("hub:google-research-datasets/mbpp:full:train",),
        validation_files=("hub:google-research-datasets/mbpp:full:validation",),
        test_files=("hub:google-research-datasets/mbpp:full:test",),
        fields="mbpp",
        prompt=CODE,
        check=SETUP,
        reply=PROGRAM,
        reward="code",
    ),
    "mbpp_last_line": SourceConfig(
        files=("hub:google-research-datasets/mbpp:full:train",),
        validation_files=("hub:google-research-datasets/mbpp:full:validation",),
        test_files=("hub:google-research-datasets/mbpp:full:test",),
        fields="mbpp_last_line",
        prompt=LAST_LINE,
        check={"tests": "tests", "setup": "setup", "prefix": "prefix"},
        reply="{line}",
        reward="code",
    ),
    "humaneval": SourceConfig(
        files=("hub:openai/openai_humaneval:test",),
        fields="humaneval",
        prompt=STUB,
        check={"tests": "tests", "prefix": "stub"},
        reply="```python\n{stub}{solution}\n```",
        reward="code",
    ),
    "klear_code": SourceConfig(
        files=("hub:Kwai-Klear/KlearReasoner-CodeSub-15K:train",),
        fields="klear_code",
        prompt="{task}",
        check={"tests": "tests", "cases": "cases"},
        reward="code",
    ),
    "apps": SourceConfig(
        files=("hub:codeparrot/apps:train",),
        test_files=("hub:codeparrot/apps:test",),
        fields="contest",
        prompt=CONTEST,
        check={"cases": "cases"},
        reward="code",
    ),
    "squad": SourceConfig(
        files=("hub:rajpurkar/squad:train",),
        test_files=("hub:rajpurkar/squad:validation",),
        fields="squad",
        prompt="{context}\n\nAnswer in as few words of the text as possible, and with nothing else: {question}",
        check={"answer": "answers"},
        reply="{answers}",
        group_by="context",
        reward="mdrl_jax.rewards.qa:f1",
    ),
    "nq_open": SourceConfig(
        files=("hub:google-research-datasets/nq_open:train",),
        test_files=("hub:google-research-datasets/nq_open:validation",),
        prompt="Answer in as few words as possible, and with nothing else: {question}",
        check=ANSWERS,
        reply="{answer}",
        reward="mdrl_jax.rewards.qa:exact_match",
    ),
    "mmlu": dataclasses.replace(
        MULTIPLE_CHOICE,
        files=("hub:cais/mmlu:all:auxiliary_train",),
        validation_files=("hub:cais/mmlu:all:validation",),
        test_files=("hub:cais/mmlu:all:test",),
        columns=("question", "A", "B", "C", "D", "answer"),
    ),
    "mmlu_pro": dataclasses.replace(MULTIPLE_CHOICE, files=("hub:TIGER-Lab/MMLU-Pro:test",)),
    "supergpqa": dataclasses.replace(
        MULTIPLE_CHOICE, files=("hub:m-a-p/SuperGPQA:train",), stratify_by="{subfield} {difficulty}"
    ),
    "sciknoweval": dataclasses.replace(MULTIPLE_CHOICE, files=("hub:hicai-zju/SciKnowEval:test",)),
    "ifeval": SourceConfig(
        files=("hub:google/IFEval:train",), fields="ifeval", prompt="{prompt}", check=KEPT, reward="cw"
    ),
    # These are not on the hub, or come in many layouts, so that the config has to name the files.
    "longbench_write": SourceConfig(
        prompt="{prompt}", check={"length": "length"}, reward="mdrl_jax.rewards.writing:wanted_length"
    ),
    "references": SourceConfig(
        prompt="{prompt}",
        check={"prompt": "prompt", "reference": "reference"},
        reply="{reference}",
        reward="mdrl_jax.rewards.judge:pairwise",
    ),
}
FILES = ("files", "validation_files", "test_files")


def completed(source: SourceConfig, where: str) -> SourceConfig:
    """Fills the fields that a source leaves at their default from its preset.

    A field that was set to its default value counts as left; a `check` that was set replaces the preset's as a whole. A
    source with any files of its own takes none of the preset's files, so that its splits do not mix two origins.

    Args:
      source: a domain's section of the config.
      where: the section's name for error messages, such as "domains.math".

    Returns:
      The completed source.

    Raises:
      UserError: if the preset is unknown; if prompt or reward are missing from both source and preset; or if `files` is
        then empty, which is also so for a source with `validation_files` or `test_files` alone.
    """
    if source.preset and source.preset not in PRESETS:
        raise UserError(f"{where}.preset={source.preset!r} is not known; known: {', '.join(PRESETS)}")
    plain, preset = SourceConfig(), PRESETS.get(source.preset, SourceConfig())
    own_files = any(getattr(source, field) for field in FILES)
    changes = {}
    for field in dataclasses.fields(SourceConfig):
        value = getattr(source, field.name)
        if value != getattr(plain, field.name) or (own_files and field.name in FILES):
            changes[field.name] = value
    whole = dataclasses.replace(preset, **changes)
    for field in ("files", "prompt", "reward"):
        if not getattr(whole, field):
            raise UserError(f"{where}.{field} is empty; set it, or name a preset that has it")
    return whole
