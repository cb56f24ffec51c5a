r"""Answers as typed values: reading, their exact values, and proofs that two are equal.

- `reply.py` finds the final answer in a reply, with `boxes.py` (boxes and formulas) and `prose.py` (plain sentences).
- `parser.py` reads an answer, in LaTeX or plain text, into a tree of `Node` (`nodes.py`). It goes from text to one
  spelling (`spelling.py`), to tokens (`tokens.py`, `words.py`), to numbers and formulas (`numbers.py`, `terms.py`).
- `values.py` gives exact values and the work that a formula leaves undone, `intervals.py` sets of numbers, and
  `proof.py` proves with sympy that two formulas are equal.

The kinds of `Node` are:

| kind | what it is | examples |
|---|---|---|
| number | an exact rational, written as a number | `3`, `1,000.5`, `\frac{6}{4}`, `1\frac{1}{2}`, `1.2e5`, `50\%` |
| symbol | a variable or constant; case matters | `x`, `\pi`, `x_1` |
| sum, product, quotient, power, root, negative, plusminus, function, call | a formula | `2\sqrt{2}`, `n(n+1)/2` |
| unit | a closed value with a unit or remark after it | `5\text{ cm}`, `12 apples`, `74^\circ` |
| based | digits in a base | `1011_2` |
| ratio | whole numbers joined by colons; also a time | `3:4`, `3:30` |
| list | values joined by commas, "and" or "or" | `1, 2`, `x=1 \text{ or } x=2` |
| group | values in brackets, in order | `(1,2)`, `[0,1)` |
| set | values in braces | `\{1,2\}` |
| union, difference | of sets | `(0,1)\cup(2,3)` |
| matrix | rows of values | `\begin{pmatrix}1\\2\end{pmatrix}` |
| relation | values joined by `=`, `<`, `\in`, `\approx` and the like | `x=5`, `0<x<1` |
| choice | a letter to choose, with the text of the choice | `\text{(B) } 5` |
| text | everything else, as its words and signs | `\text{Yes}`, `n\text{ is odd}`, `\int_0^1 x\,dx` |

What has no reading among these is text, and text equals only the same text. No formula is evaluated here.
"""
