"""Templates by strangers: what they may write is written, what would never end is stopped."""

import time

import jinja2
import pytest

from halfbyte.data import sandbox
from halfbyte.data.sandbox import TemplateLimitError, compile_template, render, weigh

MESSAGES = [{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": "y"}]
DOUBLE = "{% set ns = namespace(x='aa') %}{% for i in range(100) %}{% set ns.x = "
BIG = "{% set a = 'a' * 4000000 %}"
BOMBS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in 'x' * 99999 %}{% for j in 'x' * 99999 if j %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{{ m(n - 1) if n }}{{ m(n - 1) if n }}{% endmacro %}{{ m(60) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for i in [1] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ [0] * 10**9 }}",
    "{{ 10**(10**10) }}",
    "{{ (10**1000) * (10**1000) }}",
    DOUBLE + "ns.x ~ ns.x %}{% endfor %}",
    DOUBLE + "ns.x + ns.x %}{% endfor %}",
    DOUBLE + "[ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    DOUBLE + "{'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x }}",
    DOUBLE + "ns.x | replace('a', 'aa') %}{% endfor %}",
    DOUBLE.replace("{% set ns.x = ", "")
    + "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "{{ 'a'.center(10**10) }}",
    "{{ 'a' | center(10**10) }}",
    "{{ 'a'.zfill(10**10) }}",
    "{{ ('\\t' * 100000).expandtabs(9999) }}",
    "{{ ('a\\n' * 100000) | indent(9999) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    BIG + "{{ a.replace('a', a) }}",
    BIG + "{{ a | replace('a', a) }}",
    BIG + "{{ a.join(['b'] * 10000) }}",
    BIG + "{{ ([a] * 10000) | join }}",
    "{% for i in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}",
    "{% for i in range(99999) %}" + "static text" * 100 + "{% endfor %}",
    "{% set a %}{% for i in range(99) %}" + "x" * 100_000 + "{% endfor %}{% endset %}",
    "{% filter upper %}{% for i in range(99) %}" + "x" * 100_000 + "{% endfor %}{% endfilter %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "x" * (1 << 20) + "x",
]


@pytest.mark.parametrize("source", BOMBS, ids=lambda source: source[:60])
def test_what_would_fill_memory_or_never_end_is_stopped(source, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(TemplateLimitError):
        render(source, {"messages": MESSAGES})
    assert time.monotonic() - start < 30


def test_ranges_and_secrets_are_the_sandbox_of_jinja():
    with pytest.raises(sandbox.TemplateLimitError):
        render("{{ range(10**9) }}", {})
    for source in ("{{ cycler.__init__.__globals__ }}", "{{ messages.__class__.__mro__[0] }}"):
        with pytest.raises(jinja2.exceptions.SecurityError):
            render(source, {"messages": MESSAGES})
    with pytest.raises(jinja2.exceptions.SecurityError):
        render("{{ messages.append(1) }}", {"messages": MESSAGES})


def test_a_stopped_template_does_not_stop_the_next(monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_ROUNDS", 10)
    loop = "{% for i in range(n) %}{{ i }}{% endfor %}"
    for _ in range(3):
        assert render(loop, {"n": 9}) == "012345678"
        with pytest.raises(TemplateLimitError, match="loops more than 10 times"):
            render(loop, {"n": 99})


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("{{ 'a' * 3 ~ (1 + 2) ~ [1, 'b'] ~ {'c': none} }}", "aaa3[1, 'b']{'c': None}"),
        ("{{ 2 ** 10 % 7 }} {{ '%s-%02d' % ('a', 5) }}", "2 a-05"),
        ("{{ '{:>4}|{}'.format(1, 'b') }} {{ '%s' | format('x') }}", "   1|b x"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user, assistant"),
        ("{{ {'b': 1, 'a': '\u00e9<'} | tojson }}", '{"b": 1, "a": "\u00e9<"}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "2"),
        (
            "{% macro f(x) %}<{{ x }}>{{ caller() }}{% endmacro %}{% call f(1) %}in{% endcall %}",
            "<1>in",
        ),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        (
            "{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}",
            "13",
        ),
        ("{%- if true %}\n  {% set x = 1 %}\n{{ x }}\n{%- endif %}", "1"),
        ("{{ 'a\\nb' | indent(2) }}{{ ' x '.strip() }}{{ 'a,b'.split(',')[1] }}", "a\n  bxb"),
        ("{{ dict(a=1) }}{{ (1, 2)[0] }}{{ undefined_name }}", "{'a': 1}1"),
    ],
)
def test_the_language_is_whole(source, written):
    assert render(source, {"messages": MESSAGES}) == written


def test_what_a_template_refuses_is_its_own_error():
    with pytest.raises(jinja2.TemplateError, match="roles must alternate") as error:
        render("{{ raise_exception('roles must alternate') }}", {})
    assert not isinstance(error.value, TemplateLimitError)
    with pytest.raises(jinja2.TemplateSyntaxError):
        render("{% for %}", {})


def test_marks_are_written_on_demand_and_have_a_scope():
    source = "{% set x = 1 %}a{% generation %}{% set x = 2 %}b{{ x }}{% endgeneration %}{{ x }}"
    assert render(source, {}) == "ab21"
    assert render(source, {}, marks=True) == "a\ufdd0b2\ufdd11"
    assert compile_template(source) is compile_template(source)


def test_weight_counts_shared_lists_as_often_as_they_are_written():
    shared = ["ab"]
    assert weigh("abc") == 3
    assert weigh([shared, shared]) > 2 * len("ab")
    for _ in range(100):
        shared = [shared, shared]
    with pytest.raises(TemplateLimitError):
        weigh(shared)
