#!/usr/bin/env python3
"""Writes tests/golden/jinja.json: small templates and what Jinja2 renders with Hugging Face's settings.

usage: scripts/golden_jinja.py [seed]       needs jinja2 (recorded with 3.1.6)

Every case is a template over one fixed context. `output` is Jinja2's text, or null where it raises. The spec holds
the Lua renderer to: the same text; an error where Jinja2 raises; and for nothing else an error, unless the case is
listed under REFUSED, which are constructs that the subset leaves out.
"""
import json
import random
import sys

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def environment():
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    return env


CONTEXT = {
    "s": "  Hello, World  ", "u": "äöü ✓ 漢字", "empty": "", "n": 7, "z": 0, "f": 2.5, "yes": True, "no": False,
    "nothing": None, "list": [3, 1, 2], "words": ["b", "A", "c", "b"], "none_list": [],
    "items": [{"name": "x", "on": True}, {"name": "y", "on": False}, {"name": "z"}],
    "messages": [{"role": "system", "content": " be brief "}, {"role": "user", "content": "Hi\nthere"},
                 {"role": "assistant", "content": "Hey", "tool_calls": [{"function": {"name": "f"}}]}],
}

EXPRESSIONS = r"""
s|trim ~ '|' ~ s.strip() ~ '|' ~ s.lstrip() ~ '|' ~ s.rstrip()
'xxabxx'.strip('x') ~ 'xyab'.lstrip('yx') ~ ('abc'|trim('c'))
s|upper ~ s|lower ~ s.upper() ~ s.lower() ~ 'hello world'|capitalize ~ 'hello world'.title()
u|length ~ list|length ~ messages|count ~ empty|length ~ missing|length
u[0] ~ u[-1] ~ u[1:3] ~ u[::-1] ~ u[:2] ~ u[4:] ~ list[1:] ~ list[::-1] ~ list[-2:] ~ list[5:] ~ list[0]
messages[0].role ~ messages[0]['content'] ~ messages[-1].tool_calls[0].function.name
messages[1:]|length
messages[9]
messages[9].x
missing
missing.x
missing is defined
nothing is none and nothing is defined and missing is not none
nothing
yes ~ no ~ nothing ~ n ~ f ~ missing ~ 1.0 ~ 1e20 ~ 0.1 ~ 1e-7 ~ 123456789.125
[n + 1, n / 2, n // 2, n % 4, -n // 2, -n % 4, n ** 2, 2 ** -1, f * 2]
1 + 2 * 3 ~ 4
-n|abs
-1|string
2 ** 3 ** 2
1 / 0
1 + 'a'
'a' + 1
'a' + nothing
'a' + missing
missing + 'a'
'a' ~ missing ~ 'b'
'ab' * 3 ~ 2 * 'x'
[1, 2] + [3]
(1, 2) ~ (1,) ~ ()
['a', "it's", 'q"q', 'b\\c\n\t'] ~ ''
{'a': 1, 'b': [true, none, 1.5], 'c': {}} ~ ''
{'a': 1}['a'] ~ {'a': 1}.a ~ {'a': 1}.get('b') ~ {'a': 1}.get('b', 5)
{'b': 1, 'a': 2}|items|list
{'b': 1, 'a': 2}.items()|list ~ {'b': 1, 'a': 2}.keys()|list ~ {'b': 1, 'a': 2}.values()|list
{'a': 1}.items
{'items': 1}['items']
{'b': 1, 'a': {'x': [1, 'é', "q\"\\\n\u0001"], 'e': [], 'o': {}}}|tojson
{'b': 1, 'a': {'x': [1, 'é'], 'e': [], 'o': {}}}|tojson(indent=2)
[1, 2.0, true, none, 'x']|tojson ~ 'é'|tojson ~ nothing|tojson ~ 3|tojson
missing|tojson
list|join ~ list|join(', ') ~ items|join('-', attribute='name') ~ missing|join(',') ~ 'abc'|join('.')
words|reject('equalto', 'b')|join(',')
words|select('in', ['A', 'c'])|list
items|selectattr('on')|map(attribute='name')|join
items|rejectattr('on')|map(attribute='name')|list
items|selectattr('name', 'equalto', 'y')|list|length
items|selectattr('on', 'defined')|list|length
items|map(attribute='on', default='?')|join(',')
words|map('upper')|join
list|select('odd')|list
list|first ~ list|last ~ words|first ~ none_list|first ~ u|last
none_list|first|string
missing|default('d') ~ nothing|default('d') ~ nothing|default('d', true) ~ empty|default('d', boolean=true) ~ z|d(4, true)
'a-b-a'|replace('a', 'x') ~ 'a-b-a'|replace('a', 'x', 1) ~ 'a-b-a'.replace('a', '')
'a,b,,c'.split(',') ~ ' a  b '.split() ~ 'a,b,c'.split(',', 1) ~ 'abc'.split('x')
'a</think>b</think>c'.split('</think>')[-1].lstrip('\n')
'a\nb\r\nc\n'.splitlines()
'abc'.startswith('ab') ~ 'abc'.endswith('bc') ~ 'abc'.startswith(('x', 'a')) ~ 'abc'.endswith('')
'abcabc'.find('c') ~ 'abc'.find('x') ~ 'ababab'.count('ab') ~ u.find('✓')
', '.join(['a', 'b']) ~ '12'.isdigit() ~ ''.isdigit() ~ ' '.isspace()
['b' in 'abc', 'x' in 'abc', 'role' in messages[0], 'x' not in messages[0], 2 in list, 5 in list]
1 in 'abc'
'a' in missing
'a' in nothing
[1 == 1.0, 1 == true, 'a' == 'a', [1] == [1], {'a': 1} == {'a': 1.0}, none == missing, missing == missing2]
[1 < 2 < 3, 3 > 2 > 2, 'a' < 'b', 'a' <= 'a', 'Z' < 'a', 'é' > 'z', 1 != 2]
1 < 'a'
missing < 1
[not missing, not 0, not '', not [], not {}, not none, not 'a', not 0.0]
[yes and n, no or 'x', '' or none, n and '', not yes or yes]
'a' if yes else 'b'
'a' if no
('a' if no) is defined
'a' if no else 'b' if no else 'c'
n is number and f is number and n is integer and f is float and yes is number and yes is not integer
s is string and list is iterable and messages[0] is mapping and s is iterable and n is not iterable and list is sequence
[missing is iterable, missing is string, missing is mapping, yes is true, no is false, yes is boolean]
[n is odd, n is even, n is divisibleby 7, n is divisibleby(2), n is eq 7, n is in [7], n is gt 3, n is sameas 7]
n is defined and s is defined
raise_exception is defined
strftime_now is defined
raise_exception('stop: ' ~ n)
range(3)|list ~ range(1, 4)|list ~ range(5, 0, -2)|list
range(200000)|list
'42'|int ~ 'x'|int ~ 'x'|int(5) ~ 3.9|int ~ '1.5'|float ~ -5|abs ~ 7|string
[1, [2, 3]]|tojson
words|unique|list
'a\nb\n\nc'|indent(2) ~ 'a\nb'|indent(2, true) ~ 'a\n\nb'|indent(2, false, true)
"a" 'b' "c"
'\x41\u00e9\101\'\"\q'
'{{ }} {% %} {# #}'
"it's" ~ 'say "hi"'
{'x': {'y': {}}}
[[1, 2], [3]][1][0]
list[n]
list['x']
'abc'[7]
n.x
nothing.x
nothing['x']
s.nothing_such
list()
s.strip
'x' is not string
1_000 + 1
words|reverse|list ~ 'abc'|reverse
'abc'|list
7.5|int ~ (-7.5)|int
[1,2,3,][1]
{'a': 1,}['a']
words|map('length')|list
words|select('equalto', 'b')|list|length
words|select('equalto', 'b')|length
messages|map(attribute='role')|join(' ')
'%s' % 'a'
'é'|upper
'<a>'|e
'a'|safe
words|sort
'abc'.zfill(5)
list.append(4)
'{}'.format(1)
words|batch(2)
list[0, 1]
f(*list)
""".strip().split("\n")

TEMPLATES = [
    "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}"
    "{{ loop.last }}{{ loop.length }}{{ m.role }};{% endfor %}",
    "{% for x in list %}{{ x }}{{ loop.cycle('a', 'b') }}{{ loop.changed(x > 1) }}{% else %}none{% endfor %}",
    "{% for x in none_list %}{{ x }}{% else %}none{% endfor %}{% for x in missing %}x{% else %}undefined{% endfor %}",
    "{% for x in nothing %}{{ x }}{% endfor %}", "{% for x in n %}{% endfor %}",
    "{% for x in list if x > 1 %}{{ loop.index }}:{{ x }} {{ loop.last }}{% endfor %}",
    "{% for x in list if x > 9 %}{{ x }}{% else %}empty{% endfor %}",
    "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }},{% endfor %}",
    "{% for k, v in {'a': 1, 'b': 2} | items %}{{ k }}={{ v }}{{ ',' if not loop.last }}{% endfor %}",
    "{% for a, b in [(1, 2), (3, 4)] %}{{ a + b }}{% endfor %}", "{% for a, b in [1] %}{% endfor %}",
    "{% for a, b in [[1]] %}{% endfor %}",
    "{% for c in 'äb' %}[{{ c }}]{% endfor %}",
    "{% for x in list %}{% if x == 1 %}{% continue %}{% endif %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}",
    "{% for x in list %}{{ loop.previtem }}<{{ x }}>{{ loop.nextitem }}{{ loop.previtem is defined }} {% endfor %}",
    "{% for x in list %}{% for y in words %}{{ loop.index }}{% endfor %}{{ loop.index }}|{% endfor %}{{ loop is defined }}",
    "{% set a = 1 %}{% for x in list %}{{ a }}{% set a = x %}{{ a }} {% endfor %}{{ a }}",
    "{% set ns = namespace(a=1, b='x') %}{% for x in list %}{% set ns.a = ns.a + x %}{% endfor %}{{ ns.a }}{{ ns.b }}{{ ns.c }}",
    "{% set ns = namespace() %}{% set ns.x = 1 %}{{ ns.x }}", "{% set s.x = 1 %}", "{% set messages.x = 1 %}",
    "{% set a, b = 1, 2 %}{{ b }}{{ a }}", "{% set a = 1, 2 %}{{ a }}", "{% set a = b = 1 %}",
    "{% set a %}x{{ n }}y{% endset %}[{{ a }}]", "{% set a | upper | trim %} x {% endset %}[{{ a }}]",
    "{% if yes %}{% set inside = 1 %}{% endif %}{{ inside }}",
    "{% if no %}a{% elif n == 7 %}b{% elif yes %}c{% else %}d{% endif %}", "{% if no %}a{% else %}d{% endif %}",
    "{% if missing %}a{% endif %}b", "{% if missing.x %}a{% endif %}b", "{% if 'x' in missing %}a{% endif %}b",
    "{% macro m(a, b='B') %}[{{ a }}{{ b }}]{% endmacro %}{{ m(1) }}{{ m(1, 2) }}{{ m(b=3, a=4) }}{{ m() }}",
    "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, 2) }}", "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(c=2) }}",
    "{%- macro m(x) -%}\n  {{ x }}\n{%- endmacro -%}\n{{ m('a') ~ m('b') }}",
    "{% macro fact(k) %}{{ 1 if k < 2 else k * fact(k - 1)|int }}{% endmacro %}{{ fact(5) }}",
    "{% set g = 'out' %}{% macro m() %}{{ g }}{% set g = 'in' %}{{ g }}{% endmacro %}{{ m() }}{{ g }}",
    "{% generation %}x{{ n }}{% endgeneration %}", "{% raw %}{{ x }}{% endraw %}|", "a\n  {% raw -%}  \n {{ x }} \n {%- endraw %}\nb",
    "{# comment #}a{#- b -#} c", "a {#- x #}\nb\n{# y #}\nc\n  {# z #}  \nd", "x\n", "x\n\n", "\n{{ n }}\n", "a\r\nb\r{{ n }}",
    "  {% if yes %}  \n  a\n  {% endif %}  \nb", "  {%+ if yes %}\n  a\n  {%+ endif +%}\nb", "{% if yes -%}\n\n  a  \n{%- endif %}\n",
    "a  {{- ' b ' -}}  c\n {{ n }} \n{{- n }}", "{{n}}\n\n{%- if yes %}\n\nx\n{%- endif -%}\n\ny",
    "\t{% set x = 1 %}\n\t{{ x }}\n \t {# c #}\n", "a {% if yes %} b {% endif %} c", "{% if yes %}\n{% endif %}\n{% if yes %}\n\n{% endif %}x",
    "{{ '}}' }}{{ \"{%\" }}{% if '%}' %}y{% endif %}", "{{ {'a': {'b': 1}} }}", "{{ {'a': {'b': 1}}['a'] }}",
    "{{", "{{ n", "{% if yes %}", "{% endif %}", "{{ n }", "{{ }}", "{% for %}{% endfor %}", "{% foo %}", "{{ n | nofilter }}",
    "{{ n is notest }}", "{{ 'abc }}", "{# abc", "{% if yes %}{% else %}{% else %}{% endif %}", "{{ a b }}", "{{ (n }}", "{{ n) }}",
    "{{ [1, 2 }}", "{% set none = 1 %}", "{{ n ! }}", "{{ ? }}", "{% break %}", "{{ 1 if }}", "{{ n.7x }}", "{% raw %}x",
    "{% include 'x' %}", "{% block a %}{% endblock %}", "{% extends 'x' %}", "{% import 'x' as y %}",
    "{% filter upper %}x{% endfilter %}", "{% call x() %}{% endcall %}", "{% with a = 1 %}{{ a }}{% endwith %}",
    "{% for x in list recursive %}{{ x }}{% endfor %}",
]

REFUSED = {
    "{{ '%s' % 'a' }}", "{{ 'é'|upper }}", "{{ '<a>'|e }}", "{{ 'a'|safe }}", "{{ words|sort }}", "{{ 'abc'.zfill(5) }}",
    "{{ '{}'.format(1) }}", "{{ words|batch(2) }}", "{{ list[0, 1] }}", "{% block a %}{% endblock %}", "{{ s.strip }}",
    "{% filter upper %}x{% endfilter %}", "{% with a = 1 %}{{ a }}{% endwith %}", "{{ {'a': 1}.items }}",
    "{% for x in list recursive %}{{ x }}{% endfor %}",
}


def random_template(rng):
    """White space control in every mixture: this is where renderers differ."""
    def gap():
        return "".join(rng.choice([" ", "\n", "\t", "a", "\n  ", "\r\n", "\u00a0"]) for _ in range(rng.randrange(4)))

    def tag(body, kind):
        left, right = rng.choice(["", "", "-", "+"]), rng.choice(["", "", "-"] + (["+"] if kind != "{" else []))
        if kind == "{":
            return "{{" + left + " " + body + " " + right + "}}"
        return "{" + kind + left + " " + body + " " + right + (kind + "}")

    def body(depth):
        out = gap()
        for _ in range(rng.randrange(1, 4)):
            what = rng.randrange(6 if depth < 2 else 3)
            if what == 0:
                out += tag("n", "{")
            elif what == 1:
                out += tag("note", "#")
            elif what == 2:
                out += tag("set q = 1", "%")
            elif what == 3:
                out += tag("if yes", "%") + body(depth + 1) + tag("endif", "%")
            elif what == 4:
                out += tag("for i in list", "%") + body(depth + 1) + tag("endfor", "%")
            else:
                out += tag("if no", "%") + body(depth + 1) + tag("else", "%") + body(depth + 1) + tag("endif", "%")
            out += gap()
        return out

    return body(0)


def main():
    rng = random.Random(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    env, cases = environment(), []
    templates = ["{{ %s }}" % expression for expression in EXPRESSIONS] + TEMPLATES
    templates += [random_template(rng) for _ in range(int(sys.argv[2]) if len(sys.argv) > 2 else 150)]
    for template in templates:
        case = {"template": template}
        try:
            case["output"] = env.from_string(template).render(**CONTEXT)
        except Exception as error:  # whatever Jinja2 or Python raises is what we must refuse as well
            case["output"] = None
            case["error"] = str(error)
        if template in REFUSED:
            case["refused"] = True
        cases.append(case)
    with open("tests/golden/jinja.json", "w", encoding="utf-8") as file:
        json.dump({"jinja2": jinja2.__version__, "context": CONTEXT, "cases": cases}, file, ensure_ascii=False, indent=1)
        file.write("\n")
    print(len(cases), "cases")


main()
