"""Regular expressions of a configuration: slow ones are refused, and all others match as in PEFT."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys

import pytest

from jaxadapt import ConfigError, LoraConfig
from jaxadapt.configs import matching, validation
from jaxadapt.configs.base import loads
from jaxadapt.configs.frozen import PatternIndex, find_pattern_value
from jaxadapt.configs.validation import MAX_EXPRESSIONS, compile_pattern

USUAL = [
    r"(.*(language_model).*(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj).*$|.*(custom_text_proj).*$)",
    r"(?:.*?(?:language|text).*?(?:attn|mlp|ffn).*?(?:k_proj|fc1).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:attn|mlp)\.(?:fc1))",
    r"^(language_model|model)(?=\.).*\.(q_proj|k_proj)$",
    r"^(?!.*(lm_head|vision)).*\.(q_proj|v_proj)",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"(?:\.\w+)*\.q_proj",
    r"((?!lm_head).)*",
    r"^(?:(?!visual|merger).)*\.(?:qkv|proj)$",
    r".*\.(\d+)\..*\.(\d+)\..*proj",
    r"(.*\.){2}q",
    r"(down_blocks|mid_block|up_blocks).*(attn1|attn2).*(to_q|to_k|to_v|to_out\.0)",
    r"(?i:.*Q_PROJ)",
    "|".join(f"model.layers.{n}.q_proj" for n in range(3000)),
]
SLOW = [
    r"(a+)+$", r"(a*)*b", r"(a|a)*b", r"(a|ab)*c", r"(a?)*b", r"(?:a|aa)+$", r"(\w+\w+)+b", r"([a-z]+)*!",
    r"(?=(a+)+$)a", r"(?i:(A+)+b)", r"(a?){40}a{40}", r"((a{1,10}){1,10}){1,10}b", r"(.*a){9}b",
    r".*a.*a.*a.*a.*b", r"a*a*a*a*a*a*a*b", r"(.|\w)*b", r"(a+)(?#)+$", r"(?:a|[a])*b", "(" * 90 + "a" + ")*" * 90,
]  # fmt: skip


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_expressions_are_taken(pattern):
    LoraConfig(target_modules=pattern, exclude_modules=pattern, rank_pattern={pattern: 2}, modules_to_save=[pattern])


@pytest.mark.parametrize("pattern", SLOW)
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "rank_pattern", "modules_to_save", "layers_pattern"]
)
def test_slow_expressions_are_refused(field, pattern):
    value = {pattern: 2} if field == "rank_pattern" else [pattern] if field.endswith(("save", "rn")) else pattern
    held = {"peft_type": "LORA", "target_modules": ["q"], "layers_to_transform": [1], field: value}
    if field == "target_modules":
        del held["layers_to_transform"]
    with pytest.raises(ConfigError, match=rf"x\.json: .*{field}: .*matched in a few steps, found .*; write"):
        loads(json.dumps(held), "x.json")


def test_a_slow_expression_of_a_method_without_a_class_of_its_own_is_refused():
    for fields in ({"target_modules": "(a+)+$", "r": 2}, {"target_modules": ["q"], "rank_pattern": {"(a+)+$": 2}}):
        with pytest.raises(ConfigError, match="matched in a few steps"):
            loads(json.dumps({"peft_type": "LOHA", **fields}))
    ranks = loads(json.dumps({"peft_type": "XLORA", "target_modules": ["q"], "rank_pattern": {"(a+)+$": 2}}))
    with pytest.raises(ConfigError, match="matched in a few steps"):
        find_pattern_value(ranks.get("rank_pattern"), "a" * 60 + "b", 8)


def test_nothing_hangs():
    """`re` would take years for each of these."""
    code = "\n".join(
        [
            "import jaxadapt",
            f"for pattern in {SLOW!r}:",
            "    try: jaxadapt.LoraConfig(target_modules=pattern)",
            "    except jaxadapt.ConfigError: continue",
            "    raise SystemExit(pattern)",
            r"for pattern in (r'\d+a' * 5000, r'(?:\d+a)' * 5000 + 'x*', '^' * 5000 + r'\d*' + '(?=a)' * 5000):",
            "    jaxadapt.LoraConfig(target_modules=pattern)",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_name_too_long_for_an_expression_is_refused():
    config = LoraConfig(target_modules=r".*\.q")
    assert matching.is_target(config, "a" * 500 + ".q")
    with pytest.raises(ConfigError, match="a name of 1002 characters, which begins with 'aaa[^:]*: the limit is 512"):
        matching.is_target(config, "a" * 1000 + ".q")
    assert matching.is_target(LoraConfig(target_modules=["q"]), "a" * 1000 + ".q")


@pytest.mark.parametrize("field", ["alpha_pattern", "modules_to_save", "layers_pattern"])
def test_the_expressions_of_a_configuration_are_compiled_once(field):
    """As many as the cache holds, tried on many names; one more is an error before all are compiled."""
    plain = field == "layers_pattern"  # which embeds plain names in expressions as well
    patterns = [f"x{n}" if plain else f"x{n}+" for n in range(MAX_EXPRESSIONS + 1)]

    def held(count):
        value = dict.fromkeys(patterns[:count], 2) if field == "alpha_pattern" else patterns[:count]
        return LoraConfig(target_modules=["q"], layers_to_transform=[1], **{field: value})

    compile_pattern.cache_clear()
    with pytest.raises(ConfigError, match=f"{field}: expected at most 2048 regular expressions .* found more"):
        held(MAX_EXPRESSIONS + 1)
    config = held(MAX_EXPRESSIONS)
    for n in range(3):
        config.alpha_of(f"layers.{n}.q"), matching.is_target(config, f"layers.{n}.q")
    assert compile_pattern.cache_info().misses <= 2 * MAX_EXPRESSIONS


@pytest.mark.parametrize("field", ["rank_pattern", "modules_to_save"])
def test_names_are_looked_up_as_re_matches_them(field):
    """A dot matches any letter, also in plain names; compared with PEFT's expressions."""
    rng = random.Random(0)
    for _ in range(2000):
        keys = ["".join(rng.choices("ab..", k=rng.randint(1, 5))) for _ in range(5)] + ["a+", "b.*a", "a|b"]
        keys = list(dict.fromkeys(keys))
        name = "".join(rng.choices("ab..", k=rng.randint(1, 9))) + rng.choice(["", "", "\n", "\n\n", ".a\nb"])
        wanted = [n for n, key in enumerate(keys) if re.match(compile_pattern(field, key).pattern, name)]
        index = PatternIndex(field, keys)
        assert list(index.matching(name)) == wanted
        assert index.first(name) == (wanted[0] if wanted else None)


CLASSES = [
    "a", "x", "[^x]", "[^a]", ".", "[a-c]", "[w-z]", "[x-x]", "[y-z]", "[^a-c]", "[^w-z]", r"\d", r"\D",
    r"\w", r"\W", r"\s", r"\S",
    "[abx]", r"[\d_]", r"[^\d]", r"[^\w]", r"[\s\d]", r"[a\W]",
]  # fmt: skip


@pytest.mark.parametrize("letter", ["x", "3", "_", "-", "a"])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_repeat_gives_back_what_may_begin_the_next_part(kind: str, letter: str):
    """`re` itself says whether the class matches the letter. 20 repeats in a row then have 20 · log(ways) to match."""
    expression = f"({kind}*{re.escape(letter)}){{20}}!"
    assert validation.is_slow(expression) is bool(re.fullmatch(kind, letter))


@pytest.mark.parametrize(
    ("expression", "slow"),
    [
        (r"(a*\bb){20}c", False),  # \b has no width: b follows
        (r"(a*(?=b)b){20}c", False),
        (r"(a*(?!b)a){20}c", True),
        (r"(?>a*)" * 20 + "a", True),
        (r"(?i)(a*B){20}c", True),  # without case, letters are not compared
        (r"(a{3}a){20}c", False),  # a repeat of one length has one way
        (r"(a{3,}a){20}c", True),  # no upper bound
        (r"(a{3,4}a){20}c", False),  # 2^20 ways
        (r"(a{3,4}a){40}c", True),  # 2^40
        (r"(ab|cd){40}e", False),  # no alternative is the beginning of another one
        (r"(ab|ac|d){40}e", False),
        (r"(ab|a|d){40}e", True),
        (r"(a|[bc]d){40}e", True),
        (r"(a|){40}e", True),
        ("(ab|ac|d)" * 20 + "e", False),  # without a repeat each alternative is tried once
        (r"(?:(x)?(?(1)a*a|b*b)){20}c", True),
        (r".*.*.*.*", False),  # the last takes all that is left: 256^3 ways are not too many
        (r".*.*.*.*.*", True),
        (r"(.*){1,2}" + "a" * 300, False),  # a name has no more than 256 letters
        ("(.*a){5}b", True),
        ("(.*" + "a" * 64 + "){5}b", False),  # 4^5 ways, since 64 letters must follow each time
        ("(.*" + "[ab]" * 64 + "){5}b", False),
        ("(.*" + "(?:aa|b)" * 64 + "){5}!", False),
        (r"()(.*\1{64}a){5}b", True),  # a reference may match no letter
        (r"(?P<x>)(.*(?P=x){64}a){5}b", True),
        (r"(?:[^!]{64}!|.*a){5}b", True),  # the next round may begin with either
        (r"(?:(?=){1,20}a)*b", True),
        (r"(?:(?:ab){1}x|abx)*c", True),
        (r"(?:\.(?:c_fc|c_proj|c_attn))+$", False),
        (r"(?:(?:enc|encoder)\.)*q", True),
        (r"(?:layer(?:0|1|2)?\.)*q", False),
        ("a?" * 20, False),
        ("a?" * 40, True),
        (r"(a+)(?#the repeat of the group follows)+$", True),
        (r"((?!b)+?a)+?c", True),  # each repeat may try the look-ahead once more
        (r"((?<!b)??a)+c", True),
        (r"((?:)*a)+c", True),
        (r"(()*?a)+c", True),
    ],
)
def test_estimates(expression: str, slow: bool):
    assert validation.is_slow(expression) is slow


def test_a_name_of_the_largest_length_is_matched():
    longest = "a" * (validation.LONGEST - 2) + ".q"
    config = LoraConfig(target_modules=r".*\.q")
    assert matching.is_target(config, longest)
    with pytest.raises(ConfigError, match="the limit is 512"):
        matching.is_target(config, f"a{longest}")
