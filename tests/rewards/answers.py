r"""Replies judged by hand: wrong ones that try to be paid, and right ones in the forms that people write.

The tables map a kind to pairs (reply, right answer). `_box` boxes the first item of each pair. The name of a kind says
why its replies are wrong or right; where that does not say enough, a comment does.

- `EXAMPLES_WRONG` and `EXAMPLES_RIGHT` are replies of public bug reports, and close to them.
- `HOSTILE` are wrong replies that a reward with regular expressions and math-verify pays for.
- `WRONG` are more wrong replies of the same kinds.
- `RIGHT` are right replies, so that strictness does not pass for safety.
- `GOLDS` are right answers in the style of the MATH data set (arXiv 2103.03874), in all their forms.
"""

Pairs = list[tuple[str, str]]


def _box(pairs: Pairs) -> Pairs:
    return [(rf"\boxed{{{content}}}", gold) for content, gold in pairs]


EXAMPLES_WRONG: dict[str, Pairs] = {
    "mixed numbers": _box([
        (r"1\frac{1}{2}", "5.5"), (r"\frac{11}{2}", r"1\frac{1}{2}"),
    ]),
    "factorial": _box([
        ("5", "5!"),
    ]),
    "letters and number words": [
        *_box([
            ("2 x", "2"), ("3 i", "3"), ("3 pi", "3"), (r"2\text{ m}", r"2\text{ cm}"),
            (r"n\text{ is odd}", r"n\text{ is even}"),
        ]),
        ("The answer is 3 million.", "3"),
    ],
    "tolerance": _box([
        (r"1.6 \times 10^{-19}", r"6.63 \times 10^{-34}"), (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"),
    ]),
    "case": _box([
        (r"\frac{m}{M}", r"\frac{M}{m}"),
    ]),
    "restated": _box([
        (r"17\cdot 23", "391"), (r"\int_0^1 2x\,dx", "1"), ("3=4", "4"), ("2^{10}", "1024"),
        (r"\frac{782}{2}", "391"), (r"\sqrt{144}", "12"), ("(x+1)^2", "x^2+2x+1"),
    ]),
    "lists": _box([
        ("1,2", "1,1,2"),
    ]),
}  # fmt: skip

EXAMPLES_RIGHT: dict[str, Pairs] = {
    "mixed numbers": _box([
        (r"1\frac{1}{2}", r"\frac{3}{2}"),
    ]),
    "factorial": _box([
        ("120", "5!"),
    ]),
    "number words": _box([
        (r"3 \text{ million}", "3000000"),
    ]),
    "unreduced": _box([
        (r"\frac{6}{4}", "1.5"),
    ]),
    "statements": [
        ("So the answer is 5 + 7 = 12.", "12"), ("The answer is $x = 5$.", "5"), ("The answer is (5).", "5"),
        ("The answer is £5.", "5"), ("The answer is therefore 12.", "12"),
    ],
    "identical": [
        ("odd $n$", "odd $n$"), (r"\(x=1\) or \(x=2\)", r"\(x=1\) or \(x=2\)"),
    ],
    "forms": _box([
        ("2,1,1", "1,1,2"), ("1.2e5", "120000"), ("74°", "74"), (r"\mbox{5}", "5"),
        (r"0.\overline{3}", r"\frac{1}{3}"),
    ]),
}  # fmt: skip

HOSTILE: dict[str, Pairs] = {
    # The value is the whole number plus the fraction; not their product, not their digits in a row.
    "mixed numbers": _box([
        (r"\frac{21}{3}", r"2\frac{1}{3}"), ("7", r"2\frac{1}{3}"),
    ]),
    # In mathematics "!" is a factorial; at the end of a sentence it is an exclamation mark.
    "factorial": [
        *_box([
            ("6", "6!"), ("3!", "3"), ("7", "7!"), ("10!", "10"),
        ]),
        ("The answer is $4!$.", "4"), ("The answer is 3! + 1", "3"),
    ],
    # A letter is a factor and no unit.
    "letters after a number": _box([
        ("7 n", "7"), ("5 e", "5"), (r"2\text{ x}", "2"), (r"4\mathrm{i}", "4"), ("3ab", "3"), ("2 abc", "2"),
        (r"5\text{ k}", "5"),
    ]),
    # They multiply or divide the number before them.
    "number words": [
        *_box([
            (r"4 \text{ billion}", "4"), (r"2 \text{ dozen}", "2"), ("5 hundred", "5"), (r"7\text{ thousand}", "7"),
            (r"3\text{ halves}", "3"), (r"2\text{ tenths}", "2"), (r"5\text{ squared}", "5"),
        ]),
        ("The answer is 6 hundred dollars.", "6"), ("The answer is 9 trillion.", "9"),
        ("It costs 4 million dollars", "4"), ("#### 8 dozen", "8"), ("The answer is 5 and a half.", "5"),
    ],
    # They say that it is not, or not only, this number.
    "remarks that leave the number open": [
        *_box([
            (r"4 \text{ or greater}", "4"),
        ]),
        ("The answer is 5 or more.", "5"), ("The answer is 7 at least.", "7"), ("#### 4 or less", "4"),
        ("The answer is 6 to eight.", "6"), ("The answer is 3 more than x.", "3"), ("The answer is 12 or so.", "12"),
        ("The answer is 8 maybe.", "8"), ("The answer is 9 or ten", "9"), ("The answer is 5 if x is positive.", "5"),
    ],
    # The right answer has a unit, and the reply has another one.
    "another unit": _box([
        (r"5\text{ kg}", r"5\text{ g}"), (r"3\text{ hours}", r"3\text{ minutes}"),
        (r"10\text{ cm}^2", r"10\text{ cm}"), (r"8\text{ square feet}", r"8\text{ feet}"),
        (r"60\text{ miles}", r"60\text{ miles per hour}"), (r"4\text{ days}", r"4\text{ weeks}"),
        ("5 cents", r"5\text{ dollars}"), (r"3:30\text{ a.m.}", r"3:30\text{ p.m.}"), (r"45^\circ", r"45\text{ m}"),
    ]),
    # Other words are another answer.
    "text that changes the meaning": _box([
        (r"x\text{ is prime}", r"x\text{ is composite}"), (r"a \text{ divides } b", r"b \text{ divides } a"),
        ("n", r"n\text{ is odd}"), (r"n\text{ is odd}", "n"),
    ]),
    # Numbers differ however small their difference is.
    "small and large numbers": _box([
        (r"9.11\times 10^{-31}", r"1.67\times 10^{-27}"), ("3^{-60}", "3^{-61}"), ("10^{-20}", "10^{-21}"),
        ("e^{-40}", "e^{-41}"), (r"\sqrt{2}+0.00000000000000000001", r"\sqrt{2}"),
    ]),
    # A rounded number is not the exact one, and the exact one not the rounded.
    "approximations": _box([
        ("1.41421356", r"\sqrt{2}"), ("3.14159265", r"\pi"), ("2.718281828", "e"),
    ]),
    # Capital and small letters are different variables.
    "case of symbols": _box([
        ("x", "X"), ("aB", "Ab"), (r"\frac{R}{r}", r"\frac{r}{R}"), ("N-n", "n-N"), ("2K", "2k"), ("v+V^2", "V+v^2"),
        ("AB", "ab"), ("T_0", "t_0"), (r"\pi r^2", r"\pi R^2"), (r"\Delta", r"\delta"),
    ]),
    # The value is right, and nothing has been computed.
    "operations left to do": _box([
        (r"3 \div 2", "1.5"), 
        ("0.5+0.5", "1"), ("12-5", "7"), (r"\frac{12}{4}", "3"), (r"6\times 7", "42"), ("10^5", "100000"),
        ("2^3", "8"), ("-(-5)", "5"), (r"\frac{1}{2}+\frac{1}{3}", r"\frac{5}{6}"),
        (r"\frac{1/2}{3/4}", r"\frac{2}{3}"), (r"2\cdot\frac{3}{7}", r"\frac{6}{7}"), (r"\sqrt{9}+\sqrt{16}", "7"),
        (r"\sqrt[3]{27}", "3"), ("8^{1/3}", "2"), (r"\frac{0.5}{2}", "0.25"), (r"12\times 10^{4}", "120000"),
        (r"144^{\frac12}", "12"), (r"\frac{1}{2^3}", r"\frac{1}{8}"), (r"1-\frac{1}{4}", r"\frac{3}{4}"),
        ("48/2", "24"), ("5 - 5", "0"), (r"50\% \cdot 8", "4"), (r"100 \div 4", "25"), (r"\frac{3}{1}", "3"),
        ("4*5", "20"),
    ]),
    # The question, in the notation of its operator.
    "operators and functions": _box([
        (r"\binom{5}{2}", "10"), (r"\sum_{k=1}^{4} k", "10"), (r"\lim_{x\to 0} \frac{\sin x}{x}", "1"),
        (r"\det\begin{pmatrix}1&2\\3&4\end{pmatrix}", "-2"), (r"\lfloor 3.7 \rfloor", "3"), (r"\gcd(12,18)", "6"),
        (r"\log_2 8", "3"), ("|-5|", "5"), (r"\prod_{k=1}^4 k", "24"), (r"\max(3,7)", "7"), (r"\cos 0", "1"),
        (r"\ln e^2", "2"), (r"\lceil 2.1\rceil", "3"), (r"\frac{d}{dx} x^2", "2x"), (r"\int 2x\,dx", "x^2"),
        (r"\tan\frac{\pi}{4}", "1"), (r"\frac{5!}{3!}", "20"), (r"{5\choose 2}", "10"),
        (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", "-2"), (r"\arctan 1", r"\frac{\pi}{4}"),
        (r"\sum_{n=0}^\infty \frac{1}{2^n}", "2"), (r"\lim_{n\to\infty}\frac{n}{n+1}", "1"),
    ]),
    # A root to draw, a product, sum or quotient to work out is left.
    "irrational numbers not simplified": _box([
        (r"\sqrt{50}", r"5\sqrt{2}"), (r"\sqrt{2}\cdot\sqrt{3}", r"\sqrt{6}"), (r"\pi\cdot 3^2", r"9\pi"),
        (r"2\pi\cdot 3", r"6\pi"), (r"\sqrt{2}+\sqrt{2}", r"2\sqrt{2}"), (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}"),
        (r"\frac{1}{\sqrt{2}-1}", r"1+\sqrt{2}"), (r"\sqrt{2}+\sqrt{8}", r"3\sqrt{2}"),
        (r"(1+\sqrt{2})^2", r"3+2\sqrt{2}"), (r"\frac{\sqrt{6}}{\sqrt{2}}", r"\sqrt{3}"),
        (r"\sqrt{\frac{1}{2}}", r"\frac{\sqrt{2}}{2}"), (r"\pi+\pi", r"2\pi"), (r"\frac{6}{\sqrt{3}}", r"2\sqrt{3}"),
        (r"\sqrt[3]{16}", r"2\sqrt[3]{2}"), (r"\frac{4\pi}{2}", r"2\pi"), (r"\frac{1}{2}\cdot 10\pi", r"5\pi"),
        (r"1+\sqrt{2}+1", r"2+\sqrt{2}"), ("e^{2+3}", "e^5"), (r"\pi(5^2-3^2)", r"16\pi"),
        (r"\sqrt{9\cdot 5}", r"3\sqrt{5}"),
    ]),
    # Factors to multiply, terms to collect, fractions to reduce; or a product where a sum is given and factors are
    # asked.
    "formulas not worked out": _box([
        ("(x-2)(x+3)", "x^2+x-6"), ("x^2+x-6", "(x-2)(x+3)"), ("x+x", "2x"), ("3x+2x", "5x"),
        (r"\frac{x^2-1}{x-1}", "x+1"), (r"x\cdot x", "x^2"), ("(2x)^3", "8x^3"), (r"\frac{2x+4}{2}", "x+2"),
        (r"\frac{1}{x}+\frac{1}{y}", r"\frac{x+y}{xy}"), (r"\frac{x^3}{x}", "x^2"), ("2(x+1)", "2x+2"),
        ("(x^2-1)(x+2)", "(x-1)(x+1)(x+2)"), (r"\frac{1}{1+\frac{1}{x}}", r"\frac{x}{x+1}"), ("x^2-9", "(x+3)(x-3)"),
        (r"\frac{x^2+x}{x^2-1}", r"\frac{x}{x-1}"), ("(a+b)^2", "a^2+2ab+b^2"), ("2x+3x+1", "5x+1"),
        ("(x^2)^3", "x^6"), (r"\sqrt{4x}", r"2\sqrt{x}"), ("x^2+(1+1)x", "x^2+2x"),
    ]),
    # Every part of a chain must be true, and what stands before the answer must be its name.
    "false or unsolved equations": _box([
        ("5=6", "6"), ("x=4=5", "5"), ("2+2=5", "5"), ("x^2-9=0", "0"), ("2", "x+y=2"), (r"\sqrt{2}=3", "3"),
        (r"\binom{5}{2}=11", "11"), (r"\frac{1}{2}=0.6", "0.6"),
    ]),
    # Who names several answers has named none.
    "several answers": [
        *_box([
            (r"\boxed{5} \text{ or } 6", "5"), (r"4 \text{ or } \boxed{5}", "5"),
        ]),
        (r"\boxed{3} or \boxed{5}", "5"), (r"\boxed{3}, \boxed{4}, \boxed{5}", "5"),
        (r"\boxed{3} and \boxed{5}", "5"), (r"5 or \boxed{6}", "6"), (r"\boxed{6} or 7", "6"),
        (r"Either $\boxed{1}$ or $\boxed{2}$.", "2"), (r"\boxed{3} or maybe \boxed{4}", "4"),
        (r"\boxed{1}/\boxed{2}", "2"), ("So it is 5 or 6", "6"), ("5 to 7", "7"), ("It is one of 3, 4 or 5", "5"),
        ("Between 10 and 20", "20"), ("Answer: 3, 4, 5", "5"), (r"\boxed{3}\text{ or }\boxed{-3}", "-3"),
        ("three or 4", "4"),
    ],
    # What the reply denies or corrects is not its answer.
    "answers taken back": [
        ("The answer is 5. No wait, 6.", "5"), ("The answer isn't 5", "5"),
        (r"<think>\boxed{5}</think> I do not know", "5"), ("It is not 5", "5"),
        (r"<think>so it must be \boxed{5}", "5"), ("The answer is 8. Actually, it is 9.", "8"),
        ("The answer is 4. Sorry, I mean 5.", "4"), ("The answer is 5? No, 6.", "5"),
    ],
    # No box, but the question again; or a piece of a formula that happens to be the number.
    "the question in a statement": [
        ("So it is 17 apples * 23", "23"), ("The sum is (1+2) + 3", "3"),
        ("#### 48/2", "24"), ("It equals 10-3", "3"), ("so x^2", "2"), (r"So we get $\frac{1}{2}$.", "2"),
        ("That makes 2^10", "10"), (r"Thus $x=\sqrt{7}$", "7"), ("x_2", "2"), (r"so it is $\log_{3} 9$", "9"),
        ("so 5 + 3 = 9", "9"),
    ],
    # Points, intervals, sets, lists and matrices are different things.
    "brackets and order": _box([
        ("1,2", "(1,2)"), ("(1,2)", "1,2"), (r"\{1,2\}", "(1,2)"), (r"\{1,2\}", "1,1,2"), ("1,2,2", "1,1,2"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}\begin{pmatrix}3&4\end{pmatrix}", r"\begin{pmatrix}3&4\\6&8\end{pmatrix}"),
        (r"2\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\4\end{pmatrix}"), ("(1+1,3)", "(2,3)"),
        (r"\left(\sqrt{4},3\right)", "(2,3)"), (r"\{2^1, 3\}", r"\{2,3\}"),
    ]),
    # A ratio is reduced; a time is no fraction; digits mean something only in their base.
    "ratios, times and bases": _box([
        ("6:8", "3:4"), ("1:10", "3:30"), ("1011", "1011_2"), ("1011_3", "1011_2"), ("3:04", "3:4"),
        ("1011_2", "1011"), ("12:15", r"\frac{4}{5}"),
    ]),
    # A percent sign divides by 100, or is a unit of numbers from 1 upwards.
    "percentages": _box([
        (r"0.5\%", "0.5"),
    ]),
    "boxes, tried later": _box([
        (r"5\text{ cm}^3", r"5\text{ cm}^2"), (r"5\text{ thousand}", "5"), (r"5\text{K}", "5"), ("5!", "5"),
        ("12_{3}", "12"), ("|5|", "5"), (r"5\text{ (mod 7)}", "5"), ("1/2/3", r"\frac{1}{6}"), ("--5", "5"),
        (r"5^\circ\text{C}", r"5^\circ\text{F}"), ("5'", "5"), ("5''", "5"), ("5^{0}", "1"), ("5^1", "5"),
        ("5_{10}", "5"), (r"\log 10", "1"), (r"\ln e", "1"), (r"\exp(0)", "1"), (r"\sin^2 x+\cos^2 x", "1"),
        (r"2\sin x\cos x", r"\sin 2x"), ("n", "N"), ("p", "P"), (r"\mathbf{v}", "V"), ("y=x", "x=y+0"),
        (r"\frac{3}{4}:1", "3:4"), (r"\sqrt{12}", r"2\sqrt{3}"), (r"\sqrt{2}^2", "2"),
        (r"2\frac{\sqrt{3}}{2}", r"\sqrt{3}"), (r"\frac{\pi^2}{\pi}", r"\pi"), (r"\frac{2\sqrt2}{\sqrt 2}", "2"),
        (r"\pi-\pi", "0"), ("x-x", "0"), ("0x", "0"), (r"0\cdot 5", "0"), (r"\frac{0}{5}", "0"), ("-x=5", "5"),
        ("2x=10", "10"), (r"\frac{x}{2}=5", "5"), (r"x=\sqrt{25}", "5"), ("x=2+3", "5"), (r"x=\frac{10}{2}", "5"),
        ("5=2+3", "5"), ("x=5+0", "5"), (r"5\cdot 1", "5"), ("5+0", "5"), ("5-0", "5"), ("5/1", "5"),
        (r"1\cdot 5", "5"), (r"(1,3)\cup(2,5)", "(1,5)"), ("(2^1,3)", "(2,3)"),
        (r"\begin{pmatrix}1+1\\2\end{pmatrix}", r"\begin{pmatrix}2\\2\end{pmatrix}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}+\begin{pmatrix}1\\0\end{pmatrix}", r"\begin{pmatrix}2\\2\end{pmatrix}"),
        ("a'", "a"), ("1/2x", "1/(2x)"), ("x/2y", "x/(2y)"), (r"\frac{x^2-4}{x+2}", "x-2"), (r"x^2\cdot x^3", "x^5"),
        (r"\frac{x^5}{x^2}", "x^3"), ("(x^3)^2", "x^6"), (r"\sqrt{x^4}", "x^2"), ("a(b+c)", "ab+ac"),
        ("ab+ac", "a(b+c)"), ("(a-b)(a+b)", "a^2-b^2"), ("a^2-b^2", "(a-b)(a+b)"), ("x^2-(1-2x)", "x^2+2x-1"),
        ("-(x-1)", "1-x"), ("x-(-1)", "x+1"), ("2(3x)", "6x"), (r"2\cdot 3x", "6x"), ("3(x+1)-2", "3x+1"),
        ("x^3/x", "x^2"), ("(x+1)(x+1)", "x^2+2x+1"), ("(x+1)(x+1)^1", "x^2+2x+1"), ("x^2+2x+1+0", "x^2+2x+1"),
        (r"\cos(2x)", r"1-2\sin^2 x"), (r"\tan x\cos x", r"\sin x"), (r"e^{\ln x}", "x"), ("|x|^2", "x^2"),
        (r"\frac{d}{dx}x^3", "3x^2"), (r"\int 3x^2", "x^3"), (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
        (r"\sum_{k=1}^n k", r"\frac{n(n+1)}{2}"), (r"\lim_{h\to0} (2x+h)", "2x"),
        (r"\frac{1}{\sqrt{3}+\sqrt{2}}", r"\sqrt{3}-\sqrt{2}"), (r"\sqrt{48}", r"4\sqrt{3}"),
        (r"2\sqrt{12}", r"4\sqrt{3}"), (r"\sqrt{3}\cdot 4 \cdot 1", r"4\sqrt{3}"),
        (r"\sqrt{16}\sqrt{3}", r"4\sqrt{3}"), (r"\sqrt{16\cdot 3}", r"4\sqrt{3}"),
        (r"3^{1/2}\cdot 16^{1/2}", r"4\sqrt{3}"), (r"\frac{12}{\sqrt{3}}", r"4\sqrt{3}"),
        (r"\sqrt{50}-\sqrt{2}", r"4\sqrt{2}"), (r"5\sqrt{2}-\sqrt{2}", r"4\sqrt{2}"),
        (r"\sqrt{5^2+5^2}", r"5\sqrt{2}"), (r"\pi\cdot 4^2", r"16\pi"), (r"4\pi\cdot 4", r"16\pi"),
        (r"\frac{32\pi}{2}", r"16\pi"), (r"20\pi-4\pi", r"16\pi"), (r"\frac{1}{2}\cdot 32\pi", r"16\pi"),
        (r"\frac12(4)(8)\pi", r"16\pi"), (r"\frac{4}{3}\pi\cdot 27", r"36\pi"), (r"\frac{4}{3}\pi 3^3", r"36\pi"),
        (r"\cos\frac{\pi}{6}", r"\frac{\sqrt{3}}{2}"), (r"e^{\ln 2+1}", "2e"), (r"\ln e^{\pi}", r"\pi"),
        (r"\log_{2}{3}+\log_2 5", r"\log_2 15"), ("3+2i+2", "5+2i"), (r"\cos\pi+i\sin\pi", "-1"),
        (r"\frac{\sqrt{8}}{2}", r"\sqrt{2}"), (r"\sqrt{2}\sqrt{2}", "2"), (r"(\sqrt{2})^3", r"2\sqrt{2}"),
        (r"\sqrt[4]{4}", r"\sqrt{2}"), (r"\sqrt[6]{8}", r"\sqrt2"), ("4^{1/4}", r"\sqrt{2}"),
        (r"\sqrt{2+\sqrt{3}}", r"\frac{\sqrt{6}+\sqrt{2}}{2}"), (r"5\text{ hundredths}", "5"),
        (r"5\text{ million}", "5"), (r"5\text{ dozen}", "5"), (r"5\text{ score}", "5"), (r"5\text{ pi}", "5"),
        (r"5\,\text{e}", "5"), (r"5\text{ or less}", "5"), (r"5\ldots", "5"), ("5...", "5"), (r"5,\ldots", "5"),
        ("5?", "5"), ("12", "12_8"), ("12_8", "12"), ("12_{10}", "12"), ("a", "A"),
    ]),
    "statements, tried later": [
        ("The answer is 5 (or six).", "5"), ("The answer is 5 squared", "5"), ("The answer is 5 cubed.", "5"),
        ("The answer is 5 factorial", "5"), ("The answer is 5 to the power of x", "5"), ("The answer is 5 x", "5"),
        ("5, 6, or 7", "7"), ("maybe 5, maybe 6", "6"), ("5 or 6", "6"), ("5 and 6", "6"), ("x = 5 or x = 6", "6"),
        ("either 5 or perhaps 6", "6"), ("That leaves 15 - 7 = 9 apples.", "9"), ("So 3 million", "3"),
        ("about 5 thousand people", "5"), ("It's 3:30", "30"), ("5²", "5"), ("5 squared", "5"), ("so we get 2π", "2"),
        ("so 2 pi", "2"), ("so 2x", "2"), ("so sqrt(2)", "2"), ("√2", "2"), ("5 or more", "5"), ("5 to 6 hours", "6"),
        ("5-6 hours", "6"), ("not 5", "5"), ("it is not equal to 5", "5"), ("between 4 and 5", "5"),
        (r"\boxed{5} or 6", "5"), (r"6 or \boxed{5}", "5"), (r"\boxed{5}, or alternatively \boxed{6}", "6"),
        (r"either \boxed{5} or else \boxed{6}", "6"), (r"\boxed{5} or, if not, \boxed{6}", "6"),
        (r"\boxed{5}/\boxed{6}", "6"), (r"\boxed{5} \text{ or } \boxed{6}", "6"),
        (r"$\boxed{5}$ or $\boxed{6}$.", "6"), ("\\boxed{5}\n\nor\n\n\\boxed{6}", "6"),
        (r"\boxed{5} and \boxed{6}", "6"), (r"\boxed{5", "5"), ("The answer is 2 two", "2"),
        (r"\boxed{12}, \boxed{12}", "12"), (r"\boxed{12} and \boxed{13}.", "13"), (r"\boxed{12}; \boxed{13}", "13"),
        (r"<think>\boxed{5}</think>", "5"), ("<think>a</think><think>5", "5"), ("<think>5", "5"), ("5</think>", "5"),
        (r"\boxed{5}</think> 6", "5"), ("$$", "$$"),
    ],
    "boxes, tried last": _box([
        (r"5\text{ lakh}", "5"), (r"5\text{ crore}", "5"), (r"5\text{ quadrillion}", "5"), (r"5\text{ gross}", "5"),
        (r"5\text{ grand}", "5"), (r"5\text{ negative}", "5"), (r"5\text{ mille}", "5"), (r"5\text{ reciprocal}", "5"),
        (r"5\text{ inverse}", "5"), (r"2\infty", r"\infty"), (r"5\text{ twelfths}", "5"),
        (r"5\text{ sixteenths}", "5"), (r"3\text{ twentieths}", "3"), (r"5\text{ quintillion}", "5"),
        (r"5\text{ positive}", "5"), (r"5\text{ opposite}", "5"), 
    ]),
    "statements, tried last": [
        ("5 is not the answer.", "5"), ("5 is the wrong answer.", "5"), ("So 5 cannot be the answer.", "5"),
        ("The answer can't be 5", "5"), (r"\boxed{4} | \boxed{5}", "5"), (r"\boxed{5} vs \boxed{6}", "6"),
        (r"not \boxed{5}", "5"), (r"The answer isn't \boxed{5}", "5"), (r"The answer is not $\boxed{5}$.", "5"),
        (r"\boxed{5} is wrong", "5"), (r"\boxed{5} is incorrect.", "5"), (r"\boxed{5}? No.", "5"),
        (r"It cannot be \boxed{5}.", "5"), ("x5", "5"), ("–5", "5"), (r"\sqrt{5}", "5"),
        ("The values are 1, 2, 3, 4, 5", "5"), ("Options: 3, 4, 5", "5"), ("2, 3, 5", "5"), ("n in {1,...,5}", "5"),
        ("5 ± 1", "1"), ("no more than 5", "5"), ("less than 5", "5"), ("at least 5", "5"), ("more than 5", "5"),
        ("up to 5", "5"), ("fewer than 5", "5"), ("x > 5", "5"), ("x < 5", "5"), ("x ≠ 5", "5"), ("x ≥ 5", "5"),
        ("Is it 5?", "5"), ("Maybe it's 5", "5"), ("so negative 5", "5"), ("so minus 5", "5"),
        ("The wrong answer is 5.", "5"), ("An incorrect answer is 5", "5"), ("It is false that the answer is 5.", "5"),
        ("I doubt that the answer is 5.", "5"), ("Nobody knows whether the answer is 5.", "5"),
        ("I don't think the answer is 5.", "5"), ("Is the answer 5?", "5"), ("The answer is 5?", "5"),
        ("The answer is 5, which is wrong.", "5"), ("#### 5?", "5"), ("<answer>5, 6</answer>", "6"),
        ("greater than or equal to 5", "5"), ("≥5", "5"), ("≤ 5", "5"), ("at most 5", "5"), ("exceeds 5", "5"),
        ("under 5", "5"), ("over 5", "5"), ("below 5", "5"), ("a multiple of 5", "5"), ("divisible by 5", "5"),
        ("mod 5", "5"), ("modulo 5", "5"), ("twice 5", "5"), ("half of 5", "5"), ("the square of 5", "5"),
        ("double 5", "5"), ("2 to the power of 5", "5"), ("x to the 5", "5"), ("factorial of 5", "5"),
        ("log base 5", "5"), ("5 out of 10", "10"), ("5 of 6", "6"), ("10^{5}", "5"), ("x_{5}", "5"), ("a[5]", "5"),
        ("P(5)", "5"), (r"\binom{6}{5}", "5"), (r"\frac{1}{5}", "5"), (r"\dfrac{2}{5}", "5"), ("(3, 5)", "5"),
        ("{3, 5}", "5"), ("[3, 5]", "5"), ("3 mod 5", "5"), ("3 % 5", "5"), ("3 plus 5", "5"), ("3 times 5", "5"),
        ("3 minus 5", "5"), ("3 divided by 5", "5"), ("3 over 5", "5"), ("3 percent of 5", "5"), ("3% of 5", "5"),
        ("Step 5:", "5"), ("Question 5", "5"), ("problem 5", "5"), ("part 5", "5"), ("equation (5)", "5"),
        ("Figure 5", "5"), ("Step 5", "5"), ("Case 5", "5"), ("Chapter 5", "5"), ("Line 5", "5"),
        (r"The correct answer is \boxed{4}, not \boxed{5}.", "5"), ("I do not believe that the answer is 5", "5"),
        ("It's unclear if the answer is 5.", "5"), ("I can't say the answer is 5", "5"),
        (r"\boxed{5} isn't right", "5"), (r"\boxed{5} can't be right", "5"), (r"\boxed{5} could not be", "5"),
        (r"never \boxed{5}", "5"), (r"neither \boxed{5}", "5"), (r"\boxed{5}?", "5"), (r"$\boxed{5}$?", "5"),
        (r"The answer is: $\boxed{5}$ (incorrect)", "5"), (r"not equal to $\boxed{5}$", "5"),
        ("The answer cannot be 5.", "5"), (r"\boxed{5} versus \boxed{6}", "6"), (r"\boxed{5} || \boxed{6}", "6"),
        (r"\boxed{5} — or \boxed{6}", "6"), (r"five or \boxed{6}", "6"), (r"\boxed{5} or six", "5"),
        (r"\boxed{A} or B", "A"), (r"A or \boxed{B}", "B"), (r"\boxed{Yes} or no", "Yes"),
        ("<answer>5?</answer>", "5"), ("It's 5 or it's 6", "6"), ("It is 5; or it is 6", "6"), ("5, 6, 7", "7"),
        ("I would guess 5, 6, 7", "7"), ("Choose among 1, 2, 3, 4", "4"), ("x is at least 5.", "5"),
        ("x is at most 5", "5"), ("no less than 5 apples", "5"), ("no fewer than 5", "5"), (r"x \le 5", "5"),
        (r"x \geq 5", "5"), ("x <= 5", "5"), ("x >= 5", "5"), ("x != 5", "5"), (r"so x\neq 5", "5"), ("a=2b5", "5"),
        ("5x=15", "15"), ("2x = 10", "10"), ("x + 3 = 8", "8"), ("x - 3 = 8", "8"), ("5 to the 3rd", "3"),
        ("3rd root of 5", "5"), ("5 more than x", "5"), ("x more than 5", "5"), ("5 less than x", "5"),
        ("5 times x", "5"), ("5 times y is the total", "5"), ("5 over 7", "7"), ("5 of the 7", "7"), ("5 in 7", "7"),
        ("5 per 7", "7"), ("5 vs 7", "7"), (r"5 \times 7", "7"), (r"5 \cdot 7", "7"), (r"5 \div 7", "7"),
        (r"\pi 7", "7"), (r"7\pi", "7"), (r"7\sqrt{2}", "2"), (r"7\cdot x", "7"), (r"7 \alpha", "7"), ("7 theta", "7"),
        ("7 times that", "7"),
    ],
}  # fmt: skip

WRONG: dict[str, Pairs] = {
    "mixed numbers": _box([
        (r"2\frac{1}{3}", "7.3"), (r"2\frac{1}{3}", r"\frac{2}{3}"), (r"3\tfrac12", r"\frac{3}{2}"),
        (r"-2\frac{1}{3}", r"-\frac{5}{3}"), ("3 1/2", "15.5"), (r"1\frac{3}{2}", "1.5"),
    ]),
    "factorial": _box([
        ("4!", "24"),
    ]),
    "letters after a number": _box([
        ("7y", "7"), ("4k", "4"), (r"2\pi", "2"), (r"6\theta", "6"), ("9M", "9"), ("3 + 0x + y", "3"),
    ]),
    "remarks that leave the number open": _box([
        (r"3 \text{ plus } x", "3"), (r"10 \text{ mod } x", "10"),
    ]),
    "another unit": _box([
        ("£5", r"\$5"),
    ]),
    "text that changes the meaning": _box([
        (r"\text{increasing}", r"\text{decreasing}"), (r"\text{Alice}", r"\text{Alcie}"),
        (r"\text{yes and no}", r"\text{yes}"), (r"\text{not prime}", r"\text{prime}"), ("dog", "god"),
        ("Yes or No", "Yes"), (r"\text{(A)}", "B"),
    ]),
    "small and large numbers": _box([
        ("0.0000001", "0.0000002"), (r"\frac{\sqrt{2}}{10^{12}}", r"\frac{\sqrt{3}}{10^{12}}"),
        ("10000000000000000000000000000001", "10000000000000000000000000000000"), ("2^{100}+1", "2^{100}"),
        ("0.33333333333333333333", r"\frac{1}{3}"),
    ]),
    "approximations": _box([
        ("0.6667", r"\frac{2}{3}"), (r"\frac{22}{7}", r"\pi"), (r"\pi", "3.14"), ("0.333...", r"\frac{1}{3}"),
        (r"0.333\ldots", r"\frac{1}{3}"), (r"\frac{1}{3}", "0.33"), ("99.999999", "100"),
        (r"\frac{355}{113}", r"\pi"), (r"0.\overline{9}8", "1"),
    ]),
    "operations left to do": _box([
        ("(3)(4)", "12"), ("2**3", "8"),
    ]),
    "operators and functions": _box([
        ("f(3)", "5"), ("f'(2)", "4"), (r"12\times 10^{1}", "5!"), (r"12000\times 10^{-2}", "120"), 
        (r"\text{lcm}(4,6)", "12"), (r"\sin 30^\circ", r"\frac{1}{2}"),
        (r"e^{i\pi}", "-1"), ("i^2", "-1"), (r"17 \bmod 5", "2"), (r"\left|\{1,2,3\}\right|", "3"),
        ("P(A)", r"\frac{1}{2}"), ("1011_2", "11"), (r"\phi(9)", "6"),
    ]),
    "irrational numbers not simplified": _box([
        ("(1+i)^2", "2i"), (r"\sqrt{-4}", "2i"), ("(2+i)(3-i)", "7+i"),
    ]),
    "formulas not worked out": _box([
        ("f(x)", "x^2"), ("2x=10", "x=5"), ("2x>6", "x>3"),
    ]),
    "false or unsolved equations": _box([
        ("5=6", "5"), ("x=5", "y=5"), ("4", "x^2+y^2=4"), ("x=3,y=4", "x=4,y=3"), ("y=2x-1", "y=2x+1"),
        ("x+3=8", "5"), (r"\{x : x^2 = 4\}", r"\{2,-2\}"), (r"\{x \mid x>3\}", r"(3,\infty)"), ("1=1", "5"),
    ]),
    "several answers": [
        *_box([
            (r"5 \lor 6", "6"), ("5; 6", "6"), (r"5 \quad 6", "6"), (r"\pm 3", "3"), (r"\{1,2,3,4,5\}", "3"),
            (r"1 \le x \le 10", "7"), ("[1,10]", "7"),
        ]),
        ("The answer is 5 or 6.", "6"), ("The answer is between 4 and 6.", "6"), ("The answer is $5 or $6.", "6"),
        ("The answer is either 3 or 4.", "4"), ("#### 5 or 6", "6"), ("The answer is 1, 2, 3, 4, 5", "5"),
    ],
    "answers taken back": [
        ("The answer is not 5.", "5"), ("<think>The answer is 5.</think> 7", "5"), ("#### 5 #### 6", "5"),
        (r"\boxed{5} Wrong, \boxed{6}", "5"), ("The answer is anything but 5", "5"),
        ("The answer is less than 5", "5"),
    ],
    "the question in a statement": [
        ("The answer is 3 + 4", "7"), ("The answer is 17 * 23.", "391"), ("Answer: 2^10", "1024"),
        ("The answer is the square root of 16.", "16"), ("The answer is twice 6.", "6"),
        ("The answer is 5 times 6", "5"), ("The answer is $2^{5}$.", "5"), ("It equals 10-3", "7"),
        ("The answer is half of 8", "8"), ("The answer is the factorial of 5", "5"), ("It is 3/4", "4"),
        ("The answer is minus 5", "5"), ("We need 1 1/2", "2"),
    ],
    "brackets and order": _box([
        (r"\langle5\rangle", "5"), ("1/i", "-i"), ("(2,1)", "(1,2)"), ("[1,2]", "(1,2)"), (r"x\in[1,2]", "[1,2)"),
        ("1<x<2", "[1,2]"), ("1,234,5", "12345"),
        ("(1,23)", "123"), ("x>3", r"x\ge 3"), (r"(-\infty,2]", r"(-\infty,2)"), ("1,2", "1,2,3"), ("1,2,3", "1,2"),
        (r"(0,1)\cup(2,4)", r"(0,1)\cup(2,3)"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
        (r"\begin{pmatrix}2&0\\0&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), ("y>3", "x>3"),
        ("x<3", "x>3"),
    ]),
    "ratios, times and bases": _box([
        ("4:3", "3:4"), ("3:30", "3.5"), ("11", "1011_2"), ("3:4", "0.8"),
    ]),
    "percentages": _box([
        ("0.5", "50"), (r"0.5\%", "50"), (r"50\%", "5"), (r"50\%", "5000"), (r"5\%", r"50\%"),
        (r"\frac{1}{2}\%", "50"), ("0.1", "10"),
    ]),
}  # fmt: skip

RIGHT: dict[str, Pairs] = {
    "mixed numbers": _box([
        (r"2\frac{1}{3}", r"\frac{7}{3}"), (r"\frac{7}{3}", r"2\frac{1}{3}"), (r"3\tfrac12", "3.5"), ("1 1/2", "1.5"),
        (r"-2\frac{1}{3}", r"-\frac{7}{3}"), (r"1\,\frac12", r"\frac{3}{2}"), ("1½", "1.5"),
        (r"4\dfrac{2}{5}", "4.4"), (r"2 \frac 3 4", r"\frac{11}{4}"), (r"1\frac{1}{2}\text{ cups}", "1.5"),
        (r"\frac12", "0.5"),
    ]),
    # Evaluated, or as the right answer writes it.
    "factorial": [
        *_box([
            ("720", "6!"), ("6!", "6!"), (r"3!\cdot 4!", r"4!\cdot 3!"), ("3! = 6", "6"), ("4! + 1 = 25", "25"),
        ]),
        ("The answer is 24!", "24"), ("The answer is $5! = 120$.", "120"),
    ],
    # The right answer has none, or the same.
    "units and remarks": [
        *_box([
            (r"5\text{ cm}", "5"), ("18 dollars", "18"), ("12 apples", "12"), (r"74^\circ", "74"),
            (r"5\,\mathrm{cm}", "5"), (r"10\text{ square units}", "10"), (r"60 \text{ miles per hour}", "60"),
            (r"5\text{ cm}^2", "5"), (r"\$18", "18"), (r"20\text{ m/s}", "20"), ("5", r"5\text{ cm}"),
            ("5 cm", r"5\text{ centimeters}"), (r"8\text{ sq ft}", r"8\text{ square feet}"),
            (r"7\text{ in}^2", r"7 \text{ square inches}"), ("90", r"90^\circ"), (r"3:30\text{ p.m.}", "3:30"),
            (r"2\pi\text{ cm}", r"2\pi"), (r"\frac{1}{2}\text{ mile}", "0.5"), (r"90\text{ degrees}", r"90^\circ"),
            (r"5\text{ m}", "5"), ("€20", "20"), (r"\$5.50", "5.5"), (r"12\text{ s}", "12"),
        ]),
        ("#### 18 dollars", "18"), ("The answer is 12 apples in total.", "12"), ("The answer is 5 m.", "5"),
        ("The answer is $18.", "18"), ("The answer is 5 (five).", "5"), ("So she has 7 marbles left.", "7"),
        ("The answer is 40 miles/hour.", "40"), ("The answer is 3 people.", "3"),
    ],
    "number words": [
        *_box([
            (r"4 \text{ billion}", "4000000000"), ("2 dozen", "24"), (r"1.5\text{ million dollars}", "1500000"),
        ]),
        ("The answer is 6 hundred.", "600"), ("It costs 4 million dollars", "4000000"), ("#### 8 thousand", "8000"),
    ],
    "separators and signs": _box([
        ("1,234", "1234"), ("1{,}234", "1234"), (r"1\,234", "1234"), ("1 234", "1234"),
        ("12,345,678.5", "12345678.5"), (r"\text{-}3", "-3"), ("- 3", "-3"), ("−3", "-3"), ("+7", "7"), ("(5)", "5"),
        (r"\left(5\right)", "5"), ("5.", "5"), (r"\frac{-3}{4}", "-0.75"), (r"\frac{3}{-4}", r"-\frac{3}{4}"),
        ("-3/4", "-0.75"), (r"\mathbf{5}", "5"), ("$5$", "5"), (r"\text{5}", "5"), ("{5}", "5"), ("007", "7"),
        ("5.00", "5"), (r"\!5", "5"), (r"\$1{,}000", "1000"),
    ]),
    "decimals": _box([
        (r"0.1\overline{6}", r"\frac{1}{6}"), (r"0.\dot{3}", r"\frac{1}{3}"),
        (r"0.\overline{142857}", r"\frac{1}{7}"), (r"2.\overline{3}", r"\frac{7}{3}"), ("0.25", r"\frac{1}{4}"),
        (r"\frac{2}{6}", r"\frac{1}{3}"), (".5", "0.5"), (r"\frac13", r"0.\overline{3}"),
        (r"0.\bar{6}", r"\frac{2}{3}"),
    ]),
    "scientific notation": _box([
        (r"1.2\times 10^5", "120000"), (r"1.2\cdot 10^{5}", "120000"), ("1.2E5", "120000"),
        ("1.6e-19", r"1.6\times 10^{-19}"), (r"1\times 10^{5}", "100000"), ("100000", "10^5"),
        (r"16\times 10^{-20}", r"1.6\times 10^{-19}"), ("3e8", "300000000"), ("10^{-20}", "10^{-20}"),
        (r"-4.5\times10^{-3}", "-0.0045"), ("1.2 × 10⁵", "120000"), ("1.2 x 10^5", "120000"),
    ]),
    "percentages": _box([
        (r"50\%", "50"), (r"50\%", "0.5"), ("50", r"50\%"), ("0.1", r"10\%"), (r"12.5\%", r"\frac{1}{8}"),
        ("50 percent", "50"), (r"100\%", "1"), (r"\frac{1}{2}", r"50\%"), (r"33\frac{1}{3}\%", r"\frac{1}{3}"),
    ]),
    "words": _box([
        (r"\text{Yes}", "yes"), ("Paris", "paris"), (r"\text{(B)}", "B"), ("(C)", r"\text{C}"),
        (r"\textbf{Even}", "even"), (r"\text{ no solution }", "no solution"), (r"\text{Evelyn}", "Evelyn"),
        (r"\mathrm{True}", "true"), ("A", r"\text{(A)}"), (r"n\text{ is odd}", "$n$ is odd"),
        (r"\text{Tuesday}.", "Tuesday"),
    ]),
    "irrational numbers": _box([
        (r"2\sqrt{2}", r"\sqrt{8}"), (r"\pi/2", r"\frac{\pi}{2}"), (r"0.5\pi", r"\frac{\pi}{2}"),
        (r"\sqrt2", r"\sqrt{2}"), (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
        (r"\frac{1}{2}\sqrt{3}", r"\frac{\sqrt{3}}{2}"), ("2^{1/3}", r"\sqrt[3]{2}"),
        (r"\frac{1+\sqrt{5}}{2}", r"\frac{\sqrt{5}+1}{2}"), (r"\frac12+\frac{\sqrt5}{2}", r"\frac{1+\sqrt{5}}{2}"),
        (r"2+2\sqrt{2}", r"2(1+\sqrt{2})"), (r"9\pi", r"9 \pi"), ("√5", r"\sqrt{5}"), ("2π", r"2\pi"),
        (r"\frac{2\pi}{4}", r"\frac{\pi}{2}"), (r"-\sqrt{3}+1", r"1-\sqrt{3}"), ("3-2i", "-2i+3"), ("e^{2}", "e^2"),
        (r"\ln 4", r"2\ln 2"), ("sqrt(2)", r"\sqrt{2}"), (r"\sqrt{2}\approx 1.414", r"\sqrt{2}"),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"), (r"\sqrt{6}-\sqrt{2}", r"-\sqrt{2}+\sqrt{6}"),
        (r"\frac{3\pi}{4}", r"\frac{3}{4}\pi"), (r"12\sqrt[3]{4}", r"12\cdot\sqrt[3]{4}"),
        (r"\frac{5}{\sqrt{3}}", r"\frac{5\sqrt3}{3}"),
    ]),
    # An operation counts where the right answer has it.
    "as the right answer is written": _box([
        ("1024", "2^{10}"), ("4^5", "2^{10}"), ("2^{10}", "2^{10}"), ("391", r"17\cdot 23"),
        (r"23\cdot 17", r"17\cdot 23"), (r"\frac{1}{4^{49}}", r"\frac{1}{2^{98}}"),
        (r"\binom{5}{3}", r"\binom{5}{2}"), ("10", r"\binom{5}{2}"), (r"\sqrt{144}", r"\sqrt{144}"),
        (r"3\cdot 2^2", r"2^2\cdot 3"), (r"\frac{6}{2}", r"\frac{6}{2}"), (r"\log_2 9", r"\log_2 9"),
        ("(x+1)^2", "(x+1)^2"), (r"\sin x\cos x", r"\cos x\sin x"), ("2^{-98}", "2^{-98}"),
        ("9^{9^{9^{9}}}", "9^{9^{9^9}}"),
    ]),
    # Equal, and worked out as far as the right answer is.
    "polynomials and fractions": _box([
        ("1+2x+x^2", "x^2+2x+1"), ("2 x^{2} - 3x", "-3x+2x^2"), ("(x+3)(x-2)", "(x-2)(x+3)"),
        ("(2-x)(-3-x)", "(x-2)(x+3)"), (r"\frac{x+1}{2}", r"\frac{1}{2}(x+1)"),
        (r"\frac{x}{2}+\frac{1}{2}", r"\frac{x+1}{2}"), (r"\frac{n^2+n}{2}", r"\frac{n(n+1)}{2}"),
        (r"\frac{1}{2}n(n+1)", r"\frac{n(n+1)}{2}"), (r"\frac{x}{y}", "x/y"), ("2ab", "2ba"),
        (r"1+\frac{1}{x}", r"\frac{x+1}{x}"), ("3x^2y", "3yx^2"), (r"\frac{-1}{x}", r"-\frac{1}{x}"),
        ("(x-1)^2(x+1)", "(x+1)(x-1)(x-1)"), ("x(x-1)", "x(x-1)"), (r"\sqrt{x^2+1}", r"\sqrt{1+x^2}"),
        (r"\frac{x+1}{x-1}", r"\frac{-x-1}{1-x}"), ("a_1+a_2", "a_2+a_1"), ("x^{-1}", r"\frac{1}{x}"),
    ]),
    "equations and labels": _box([
        ("x=5", "5"), ("5", "x=5"), ("y=2x+1", "y=2x+1"), ("y = 1 + 2x", "y=2x+1"), ("2x+1", "y=2x+1"),
        ("f(x)=2x+1", "2x+1"), (r"17\cdot 23 = 391", "391"), (r"\frac{1}{2} = 0.5", "0.5"), ("m+n=12", "12"),
        (r"\text{Area} = 12", "12"), ("f(3)=7", "7"), (r"\angle ABC = 74^\circ", "74"), (r"\int_0^1 2x\,dx = 1", "1"),
        (r"\binom{5}{2}=10", "10"), ("x = y = 5", "5"), ("5 = x", "5"), ("x^2+y^2=4", "y^2+x^2=4"),
        ("2x+2y=4", "x+y=2"), ("x=1,y=2", "y=2,x=1"), (r"\gcd(12,18)=6", "6"), ("P(A)=0.5", r"\frac{1}{2}"),
        (r"\sqrt{144}=12", "12"), ("a^2+b^2=13", "13"), (r"x=\frac{3}{2}=1.5", "1.5"),
    ]),
    "lists and sets": _box([
        ("3,1,2", "1,2,3"), ("1 and 2", "1,2"), (r"1\text{ or }2", "1,2"), (r"\{2, 1\}", r"\{1,2\}"),
        (r"\{1,2\}", "2,1"), ("2,-2", r"\pm 2"), (r"\pm 2", "-2,2"), ("x=1,2", "1,2"), ("x=1, x=2", "1,2"),
        ("x_1=1, x_2=2", "1,2"), (r"1\pm\sqrt{2}", r"1+\sqrt{2},1-\sqrt{2}"), ("0.5, 1", r"\frac{1}{2}, 1"),
        (r"x=\pm 3", "3,-3"), ("(1,2),(3,4)", "(3,4),(1,2)"), (r"1,\ 2,\text{ and }3", "1,2,3"),
        (r"\{1,1,2\}", r"\{1,2\}"), ("2;3", "2,3"), (r"x=1\text{ or }x=2", "1,2"), (r"\emptyset", r"\varnothing"),
    ]),
    "pairs, intervals and matrices": _box([
        ("(1, 2)", "(1,2)"), (r"\left(\frac{1}{2},3\right)", "(0.5,3)"), ("(x,y)=(1,2)", "(1,2)"),
        (r"x\in[1,2)", "[1,2)"), (r"1\le x<2", "[1,2)"), (r"(3,\infty)", "x>3"), ("3<x", "x>3"),
        (r"(3,\infty)\cup(-\infty,2)", r"(-\infty, 2) \cup (3, \infty)"),
        (r"x<2\text{ or }x>3", r"(-\infty,2)\cup(3,\infty)"),
        (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"),
        (r"\begin{pmatrix}0.5\\1\end{pmatrix}", r"\begin{pmatrix}1/2\\1\end{pmatrix}"),
        (r"\mathbb{R}\setminus\{2\}", r"(-\infty,2)\cup(2,\infty)"), (r"[0,\pi]", r"[0,\pi]"),
        (r"(2,+\infty)", r"(2,\infty)"), (r"(r,\theta)=(2,\pi)", r"(2,\pi)"),
        (r"\langle 1,2\rangle", r"\langle 1, 2 \rangle"), (r"(1,\sqrt{2})", r"(1,\sqrt2)"),
        ("(100,200)", "(100, 200)"), (r"\{100,200\}", r"\{200, 100\}"),
    ]),
    "ratios, times and bases": _box([
        ("3:4", "3:4"), (r"\frac{3}{4}", "3:4"), ("3:4", r"\frac{3}{4}"), ("3:30", "3:30"), ("1011_2", "1011_{2}"),
        ("1A_{16}", "1A_{16}"), ("1:2:3", "1:2:3"), (r"1011_{\text{two}}", r"1011_{\text{two}}"), ("3 : 4", "3:4"),
    ]),
    # Boxes, lines with ####, statements and plain text.
    "where the answer stands": [
        *_box([
            (r"\boxed{5}", "5"), (r"\left\{ 1, 2 \right\}", "1,2"),
        ]),
        ("That is 60 g * 4/5 = 48 grams", "48"), ("So 7 boxes x 3 = 21.", "21"),
        ("Answer: 5", "5"), ("**Answer:** 12", "12"), ("The answer is: **5**.", "5"),
        (r"The final answer is $\frac{1}{2}$.", "0.5"), ("The answer is\n\n42", "42"),
        ("The answer is:\n\\[\nx = 5\n\\]", "5"), ("The answer is 5. I hope this helps with 3 others.", "5"),
        ("#### 5 + 7 = 12", "12"), ("#### $x=5$", "5"), ("#### (5)", "5"), ("#### £5", "5"),
        ("#### therefore 12", "12"), ("#### **9**", "9"), (r"\fbox{5}", "5"), (r"\boxed 5", "5"),
        (r"\boxed{5}. \boxed{}", "5"), (r"First \boxed{3}. Then \boxed{4}.", "4"),
        ("<think>the answer is 5</think> 7", "7"), ("<think>5</think>\n\\boxed{6}", "6"),
        (r"\boxed{1} and \boxed{2}", "1,2"), (r"\boxed{\frac{1}{2}} or \boxed{0.5}", "0.5"),
        (r"\boxed{0.5} or 1/2", r"\frac{1}{2}"), ("The answer is 5. No wait, 6.", "6"), ("So we get $x = 7$.", "7"),
        (r"Hence \(x = \frac{3}{4}\).", "0.75"), ("8 * 2 = 16 apples", "16"), ("Thus the total is $18.", "18"),
        ("1 2 3 4 5", "5"), ("The answer is $5$ since $2+3=5$.", "5"), ("The answer is simply 8.", "8"),
        ("The answer is equal to 8.", "8"), (r"The answer is given by $2\pi$.", r"2\pi"),
        ("The answer is x = 1 or x = 2.", "1,2"), ("The answer is 50%.", "50"), ("It is about 3 dozen", "36"),
        ("The answer is that she has 12 apples.", "12"), ("The answers are 1 and 2.", "1,2"),
    ],
    "boxes, tried later": _box([
        (r"5\text{ cm}", r"5\,\text{cm}"), (r"5\,", "5"), (" 5 ", "5"), (r"\text{ 5 }", "5"), (r"\textbf{5}", "5"),
        (r"\displaystyle 5", "5"), (r"5\%", "5"), (r"\frac{5}{10}", "0.5"), ("5/10", r"\frac12"), ("0.50", "0.5"),
        ("1e3", "1000"), ("10^3", "10^3"), ("1,000", "1000"), (r"1\;000", "1000"), (r"\infty", r"\infty"),
        (r"+\infty", r"\infty"), (r"5 \text{ units}", "5"), (r"5 \text{ ways}", "5"),
        (r"5 \text{ possible values}", "5"), ("5", "5"), (r"\left(-\infty, \frac{1}{2}\right]", r"(-\infty,0.5]"),
        (r"x \in (-\infty, 2) \cup (2, \infty)", r"(-\infty,2)\cup(2,\infty)"),
        (r"x\neq 2", r"(-\infty,2)\cup(2,\infty)"), (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
        (r"\frac{\pi}{6}", r"\dfrac{\pi}{6}"), (r"\frac{\pi}{6}", r"\frac16\pi"),
        (r"\sqrt{3}/2", r"\frac{\sqrt{3}}{2}"), ("3√2", r"3\sqrt{2}"), (r"y = \frac{1}{2}x + 3", r"y=\frac{x}{2}+3"),
        ("y=0.5x+3", r"y=\frac12x+3"), ("3+0.5x", r"y=\frac12x+3"),
        ("(x - 3)^2 + (y+1)^2 = 16", "(y+1)^2+(x-3)^2=16"), (r"x=-2 \text{ and } x=3", "-2,3"),
        (r"\left\{-2,3\right\}", "-2,3"), (r"x_{1}=-2,\ x_{2}=3", "-2, 3"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}"),
        (r"\left[\begin{array}{cc}1&2\\3&4\end{array}\right]", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        (r"\begin{pmatrix} 1 \\[2pt] 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"\begin{pmatrix} -1 \\ 2 \\ \end{pmatrix}", r"\begin{pmatrix}-1\\2\end{pmatrix}"), (r"11\text{th}", "11"),
        (r"11^{\text{th}}", "11"), (r"3^{\text{rd}}", "3"), (r"5\text{ cm}.", "5"), (r"\$ 5", "5"), (r"5\$", "5"),
        (r"5 \text{ dollars}", r"\$5"), (r"120^{\circ}", "120"), (r"120\degree", "120"), (r"\text{Monday}", "Monday"),
        (r"\text{monday}", "Monday"), (r"\text{Yes.}", "Yes"),
        (r"\frac{x^2}{4}+\frac{y^2}{9}=1", r"\frac{y^2}{9}+\frac{x^2}{4}=1"),
        ("9x^2+4y^2=36", r"\frac{x^2}{4}+\frac{y^2}{9}=1"), ("2x^2 + 3x - 5", "2x^{2}+3x-5"),
        ("-5+3x+2x^2", "2x^2+3x-5"), ("x(x+1)(x+2)", "(x+1)x(x+2)"), ("-(x-1)(x+2)", "(1-x)(x+2)"),
        (r"\frac{1}{3}, \frac{2}{3}", r"\frac{2}{3},\frac{1}{3}"), (r"\cos x", r"\cos(x)"),
        (r"\sin^2 x", r"(\sin x)^2"), ("e^{-x}", r"\frac{1}{e^x}"), (r"\frac{e^x}{2}", r"\frac12e^x"),
        ("2+3i", "3i+2"), ("i", "i"), ("-i", "-i"), (r"\frac{1}{2}-\frac{\sqrt{3}}{2}i", r"\frac{1-i\sqrt{3}}{2}"),
        (r"1+2\sqrt{3}i", r"1+2i\sqrt{3}"),
        (r"4\text{ hours } 30\text{ minutes}", r"4\text{ hours }30\text{ minutes}"), ("2^{n}-1", "2^n-1"),
        ("n!", "n!"), (r"\frac{n!}{2}", "n!/2"), ("a^{m+n}", "a^{n+m}"), (r"k+\frac12", r"\frac{1}{2}+k"),
        (r"\text{no real solutions}", "no real solutions"), (r"\varnothing", r"\emptyset"), (r"\{\}", r"\emptyset"),
        ("DNE", "DNE"), (r"\text{undefined}", r"\text{undefined}"), (r"8\pi\text{ square units}", r"8\pi"),
        (r"8\pi", r"8\pi\text{ cm}^2"), ("25.13", "25.13"), ("2,3,5,7", "7,5,3,2"), (r"\{A,B\}", "A,B"),
        ("A, B, C", "A,B,C"), ("ABC", "ABC"), (r"\triangle ABC", r"\triangle ABC"), ("x^2+y^2-4=0", "x^2+y^2=4"),
        ("-x^2-y^2=-4", "x^2+y^2=4"), ("x=2y", "x=2y"), (r"\theta = 30^\circ", "30"),
        (r"\frac{1}{\sqrt{x}}", r"\frac{\sqrt{x}}{x}"), ("x^{1/2}", r"\sqrt{x}"), (r"x\sqrt{x}", "x^{3/2}"),
        (r"5\text{ feet}", r"5\text{ ft}"), (r"5\text{ sq. units}", r"5\text{ square units}"),
        (r"5\ \text{cm}^2", r"5\text{ sq cm}"), (r"0.\overline{09}", r"\frac{1}{11}"),
        (r"3.1\overline{4}", r"\frac{283}{90}"), ("11^{th}", "11"), ("11th", "11"), (r"\$5", "5"), (r"\fbox{5}", "5"),
        (r"\left(3, \dfrac{\pi}{2}\right)", r"\left( 3, \frac{\pi}{2} \right)"), ("-q+p", "p - q"),
        ("14/3", r"\frac{14}{3}"), ("11111111100", r"11,\! 111,\! 111,\! 100"),
        ("11,111,111,100", r"11,\!111,\!111,\!100"), ("x=1,-2", "1,-2"),
        (r"1+\sqrt{19},\ 1-\sqrt{19}", r"1 \pm \sqrt{19}"),
        (r"x \in (-\infty,2)\cup(3,\infty)", r"(-\infty, 2) \cup (3, \infty)"), ("y=3+2x", "y = 2x + 3"),
        (r"11\sqrt{2}", r"11\sqrt2"), ("-6+3x+x^3", "x^3+3x-6"), ("-24-4r+6r^2", "6r^2-4r-24"),
        (r"-2 \le x \le 7", "[-2,7]"), ("5x-7y+11z=-4", "5x - 7y + 11z + 4 = 0"), ("7, 5, 3", "3, 5, 7"),
        ("C", r"\text{(C)}"), (r"864\text{ in}^2", r"864 \mbox{ inches}^2"), ("864", r"864 \mbox{ inches}^2"),
        (r"\frac{5}{9}", r"\frac 59"), ("52_{8}", "52_8"), ("36", r"\$36"), (r"\sqrt{15}", r"\sqrt{15}\text{ cm}"),
        (r"\text{June 20}", r"\text{June 20}"), ("June 20", r"\text{June 20}"),
        (r"\{-2, 1+\sqrt5, 1-\sqrt5\}", r"\{1\pm\sqrt{5},-2\}"), (r"\frac{270}{7}", r"\frac{270}7\text{ degrees}"),
        (r"\frac{270}{7}^\circ", r"\frac{270}7\text{ degrees}"), ("2+2k", "2k+2"),
        (r"\left(\frac35,\frac83\right]", "(3/5, 8/3]"), (r"5\text{ and }7", "5,7"), ("3", r"\log_2 8"),
        (r"\frac{3}{2}", r"\log_4 8"), ("1", r"\tan 45^\circ"), ("0.5", r"\sin 30^\circ"), ("2", r"\sqrt{4}"),
        (r"\frac{1}{2}\left(1+\sqrt{5}\right)", r"\frac{1+\sqrt5}{2}"),
        (r"\frac{-3+\sqrt{17}}{4}", r"-\frac{3}{4}+\frac{\sqrt{17}}{4}"),
        (r"\frac{\sqrt{17}-3}{4}", r"\frac{-3+\sqrt{17}}{4}"), (r"-\frac{3-\sqrt{17}}{4}", r"\frac{-3+\sqrt{17}}{4}"),
        (r"2\sqrt{3}+4", r"4+2\sqrt{3}"), (r"2(2+\sqrt{3})", r"4+2\sqrt{3}"),
        (r"\frac{4\sqrt{3}}{3}", r"\frac{4}{3}\sqrt{3}"), (r"\frac{4}{\sqrt{3}}", r"\frac{4\sqrt{3}}{3}"),
        (r"\frac{4 \sqrt 3}{3}", r"\frac{4\sqrt{3}}{3}"), (r"\frac{100\pi}{3}", r"\frac{100}{3}\pi"),
        (r"33\frac{1}{3}\pi", r"\frac{100}{3}\pi"), (r"4\pi + 2", r"2 + 4\pi"), (r"2(1+2\pi)", r"2+4\pi"),
        (r"\pi^2", r"\pi^2"), (r"\frac{\pi^2}{6}", r"\frac{1}{6}\pi^2"), ("e", "e"), (r"\frac{1}{e}", "e^{-1}"),
        (r"2\ln 3", r"\ln 9"), (r"\sqrt[3]{4}", "4^{1/3}"), (r"\sqrt[3]{4}", "2^{2/3}"), ("a+b", "b+a"),
        ("ab", "b a"), (r"a\cdot b", "ab"), (r"a \times b", "ab"), (r"\frac{a}{2}+\frac{b}{2}", r"\frac{a+b}{2}"),
        ("0.5(a+b)", r"\frac{a+b}{2}"), (r"\frac{1}{2}a+\frac12 b", r"\frac{a+b}{2}"),
        (r"\frac{ab}{c}", r"\frac{a}{c}b"), ("x^2/4", r"\frac{x^2}{4}"), ("-x^2+4", "4-x^2"),
        ("(x+2)(x-3)", "(x-3)(x+2)"), ("3(x-2)(x+2)", "3(x+2)(x-2)"), ("-3(2-x)(x+2)", "3(x+2)(x-2)"),
        ("x(x+2)^2", "(x+2)^2x"), (r"\frac{n(n-1)}{2}", r"\frac{n^2-n}{2}"),
        (r"\frac{n}{2}(n-1)", r"\frac{n(n-1)}{2}"), (r"\frac{1}{x+1}+2", r"2+\frac{1}{1+x}"),
        (r"\frac{2x+3}{x+1}", r"2+\frac{1}{x+1}"), (r"\frac{2}{x(x+1)}", r"\frac{2}{x^2+x}"),
        (r"\frac{1}{x}-\frac{1}{x+1}", r"\frac1x-\frac1{x+1}"), ("x^{n+1}", "x^{1+n}"), ("2^{n+1}", r"2\cdot 2^n"),
        (r"3\cdot 2^{n}", "3(2^n)"), ("(-1)^n", "(-1)^n"), (r"\frac{(-1)^n}{n}", r"\frac{(-1)^n}{n}"),
        (r"\sqrt{a^2+b^2}", r"\sqrt{b^2+a^2}"), (r"\sqrt{ab}", r"\sqrt{ba}"),
        (r"\frac{\sqrt{x}}{2}", r"\frac12\sqrt{x}"), (r"\sin\theta\cos\theta", r"\cos\theta\sin\theta"),
        (r"\tan^2 x+1", r"1+\tan^2 x"), (r"-\cos x+C", r"C-\cos x"), (r"\frac{x^3}{3}+C", r"\frac13x^3+C"),
        (r"\ln|x|+C", r"C+\ln|x|"), ("xe^x-e^x+C", "e^x(x-1)+C"), (r"y=-\frac{2}{3}x+4", r"y = 4-\frac23x"),
        (r"y-4=-\frac23x", r"y-4=-\frac23x"), ("x-2y+3=0", "-x+2y-3=0"), ("x^2+y^2-2x=0", "x^2-2x+y^2=0"),
        ("f(x)=x^2", "f(x)=x^2"), ("x^2", "f(x)=x^2"), ("a_n=2n+1", "2n+1"), ("a_n = 2n+1", "a_n=2n+1"), ("T=5", "5"),
        ("k=-3", "-3"), (r"x<-2 \text{ or } x>2", r"(-\infty,-2)\cup(2,\infty)"),
        (r"(-\infty,-2)\cup(2,\infty)", r"x<-2\text{ or }x>2"), (r"x>2\text{ or }x<-2", r"x<-2\text{ or }x>2"),
        ("2>x", "x<2"), (r"x\geq 1", r"[1,\infty)"), (r"0<x\leqslant 5", "(0,5]"), ("-1<x<1", "-1 < x < 1"),
        (r"\mathbb{R}", r"(-\infty,\infty)"), (r"x\in\mathbb{R}", r"\mathbb{R}"), (r"x \ne \pm 1", r"x\neq\pm 1"),
        ("(1,2), (3,4)", "(3,4),(1,2)"), (r"(1,2)\text{ and }(3,4)", "(3,4),(1,2)"),
        (r"(1,2)\text{ or }(3,4)", "(3,4),(1,2)"), (r"\{(1,2),(3,4)\}", "(3,4),(1,2)"),
        ("(x, y, z) = (1,2,3)", "(1,2,3)"), ("P=(1,2)", "(1,2)"), (r"A=\{1,2\}", r"\{1,2\}"),
        ("x=1, y=2, z=3", "x=1,y=2,z=3"), (r"\text{3 cm}", "3"), (r"3\text{cm}", "3"), ("3cm", "3"),
        (r"3~\text{cm}", "3"), (r"3\,\mathrm{m/s}", "3"), (r"3\,\mathrm{m}\,\mathrm{s}^{-1}", "3"),
        (r"9.8 \text{ m/s}^2", "9.8"), (r"3\text{ ft.}", "3"), (r"3\text{ students}", "3"), (r"3\text{ people}", "3"),
        (r"3 \text{ (units)}", "3"), (r"3\text{ hours}", r"3\text{ hrs}"), (r"3\text{ miles}", "3"),
        (r"\$3.50", "3.50"), (r"3.50\text{ dollars}", r"\$3.50"), (r"30\text{ minutes}", "30"),
        (r"100\text{ mL}", "100"), (r"7\text{ days}", "7"), (r"2\text{ years old}", "2"), ("3.0", "3"), ("3.", "3"),
        ("+3", "3"), (r"\{3\}", "3"), ("3 ", "3"), (r"\text{3}", "3"), (r"\underline{3}", "3"), (r"\mathrm{3}", "3"),
        (r"\large 3", "3"), (r"3\;", "3"), (r"\text{True}", "true"), ("No", "no"), (r"\text{Yes}", "Yes."),
        (r"\text{(D)}", "(D)"), ("D", "(D)"), (r"\text{D}", "D"), (r"\textbf{(D)}", "D"), (r"(D)\ 5", r"(D)\ 5"),
        (r"\text{East}", "east"), (r"\text{New York}", "New York"), ("MATH", "math"),
    ]),
    "statements, tried later": [
        ("The answer is the 11th.", "11"), ("The answer is 5, not 6.", "5"),
        ("The answer is 5. The answer is 6.", "6"), ("The answer is 5\n6", "5"), ("The answer is 5 percent", "0.05"),
        ("The answer is 5 thousand.", "5000"), ("The answer is $5.", "5"), (r"The answer is \$5.", "5"),
        ("The answer is $5$.", "5"), ("The answer is $$5$$.", "5"), (r"The answer is \(5\).", "5"),
        (r"The answer is \[5\]", "5"), ("The answer is `5`.", "5"), ('The answer is "5".', "5"),
        (r"The answer is: $\boxed{5}$", "5"), ("The answer is 5 apples.", "5"), ("The answer is 5 red apples", "5"),
        ("The answer is 5 km/h.", "5"), ("The answer is 1,234 dollars.", "1234"),
        ("The answer is $1,234.50.", "1234.5"), ("The answer is 5%.", "5"), ("The answer is 5 °C.", "5"),
        ("The answer is 5°.", "5"), ("The answer is -5.", "-5"), ("The answer is – 5.", "-5"),
        ("The answer is 3/4.", "0.75"), ("The answer is 1 1/2.", "1.5"), ("The answer is 2.5 hours.", "2.5"),
        ("The answer is therefore $x = 5$.", "5"), ("The answer is thus 5", "5"),
        ("So, the answer is that there are 5 apples.", "5"), ("The answer is 10 + 2 = 12 apples.", "12"),
        ("The answer is 3 * 4 = 12.", "12"), ("The answer is 5 = 5.", "5"), ("The answer is 5 ≈ 6", "5"),
        ("final answer: 7", "7"), ("Final Answer: The final answer is $7$. I hope it is correct.", "7"),
        ("**Final Answer**\n\n7", "7"), ("Answer = 7", "7"), ("ANSWER: 7", "7"), ("answer is\n7", "7"),
        ("My answer: 7 apples", "7"), ("The answer is A", "A"), ("The answer is (A).", "A"),
        (r"The answer is \text{(A)}", "A"), ("The answer is yes.", "Yes"), ("####5", "5"), ("#### -5", "-5"),
        ("#### 5.0", "5"), ("#### 5 apples", "5"), ("#### \n5", "5"), ("#### The answer is 5", "5"),
        ("It is 5.", "5"), ("Total: 5", "5"), ("= 5", "5"), ("x=5", "5"), ("so x = -5", "-5"), ("2+3=5", "5"),
        ("she has 5 apples left", "5"), ("it costs $5", "5"), ("it costs $5.50 each", "5.5"),
        ("it takes 5 hours.", "5"), ("That leaves 15 - 7 = 8 apples.", "8"), ("So 3 million", "3000000"),
        ("So 5%", "5"), ("it's 1/2", "0.5"), ("it is 2.5.", "2.5"), ("-3", "-3"), ("So -3", "-3"), ("5!", "5"),
        ("the 3rd", "3"), (r"\boxed{5}\boxed{6}", "6"), (r"\boxed{5}. If wrong, \boxed{6}", "6"),
        (r"\boxed {5}", "5"), ("boxed{5}", "5"), (r"\boxed{}5", "5"), (r"\boxed{5}.", "5"), (r"$\boxed{5}$", "5"),
        (r"\[\boxed{5}\]", "5"), (r"The answer is $\frac{3}{4}$ of the cake.", "0.75"),
        ("The answer is 3/4 of the cake.", "0.75"), ("Thus, the answer is:\n\n$$x = 12$$", "12"),
        ("the answer is 12 (twelve).", "12"), ("The answer is 12. Therefore, Bob has 3.", "12"),
        ("The answer is 12! I'm sure.", "12"), ("The answer is 12\n\nNote: 13 was wrong", "12"),
        ("The answer is 12, which is 3 times 4.", "12"), ("The answer is 12 because 3*4=12.", "12"),
        ("The correct answer is 12.", "12"), ("The answer would be 12.", "12"), ("answer: $12", "12"),
        ("Answer: **12 apples**", "12"), ("Answer:\n12", "12"), ("The answer is 12.0", "12"),
        ("The answer is $12,000.", "12000"), ("The answer is 12,\n13", "12"), (r"The answer is \frac{1}{2}.", "0.5"),
        ("The answer is (1, 2).", "(1,2)"), ("The answer is [1, 2).", "[1,2)"), (r"The answer is \{1, 2\}.", "1,2"),
        ("The answer is x^2+1.", "x^2+1"), ("The answer is Paris.", "Paris"), ("The answer is **Paris**.", "Paris"),
        ("The answer is the Paris", "Paris"), ("Paris", "Paris"), ("The answer is yes", "Yes"),
        ("The answer is 50 cents.", "50"), ("The answer is 5 1/2 hours.", "5.5"), ("The answer is 5½.", "5.5"),
        ("The answer is 5.5 hours", "11/2"), ("The answer is 2^3 = 8.", "8"),
        ("The answer is x = 3 and y = 4", "x=3,y=4"), ("The answer is 7 + 3i.", "7+3i"),
        ("The answer is 3 dozen.", "36"), ("The answer is 2:30 pm", "2:30"), ("The answer is $2 + $3 = $5", "5"),
        ("The answer is 12 ÷ 4 = 3", "3"), ("#### 12 because", "12"), ("#### answer: 12", "12"),
        ("#### $12$ dollars", "12"), ("####12####", "12"), ("#### 12.", "12"), ("#### 12\n13", "12"),
        ("#### 12\n#### 13", "13"), (r"\boxed{12}. The answer is 13.", "12"), (r"\boxed{12} = \boxed{12}", "12"),
        (r"x=\boxed{12}, y=\boxed{13}", "13"), (r"The answers are \boxed{1} and \boxed{2}.", "2,1"),
        (r"\boxed{1}, \boxed{2}, and \boxed{3}", "1,2,3"), (r"$\boxed{1}$, $\boxed{2}$", "1,2"),
        (r"\boxed{1} or \boxed{1}", "1"), (r"</think>\boxed{5}", "5"), ("<think>a</think>The answer is 5", "5"),
        (r"\boxed{5}</think> 6", "6"), ("The answer is -$5.", "-5"), ("The answer is $-5.", "-5"),
        ("The answer is -5 degrees.", "-5"), ("#### -5 °C", "-5"), ("so it's -$5", "-5"), ("so it's $-5$", "-5"),
    ],
    "boxes, tried last": _box([
        ("x=3, y=4", "(3,4)"), (r"\mathbb{R}", r"\text{all real numbers}"),
        (r"(-\infty,\infty)", r"\text{all real numbers}"), (r"\text{all real numbers}", r"(-\infty,\infty)"),
        (r"\text{DNE}", "DNE"), (r"\text{does not exist}", "DNE"), ("-0", "0"),
        (r"\begin{aligned} x &= 5 \end{aligned}", "5"), (r"\text{The answer is } 5", "5"), (r"\text{Answer: }5", "5"),
        ("a=2, b=3", "(2,3)"), ("(2,3)", "(a,b) = (2,3)"), (r"f^{-1}(x)=\frac{x-1}{2}", r"\frac{x-1}{2}"),
        (r"\frac{x-1}{2}", r"f^{-1}(x) = \frac{x-1}{2}"), ("P(x)=x+1", "x+1"), ("p(x)=x^2+1", "x^2+1"),
        ("h(t)=5t", "5t"), (r"\text{B. }5", r"\text{B}"), (r"\text{(B) } 5", r"\text{(B)}"), ("B. 5", "B"),
        (r"\text{B}", r"\text{(B) }5"), (r"\textbf{(B)}\ 5", "B"), (r"\frac{\ln 3}{\ln 2}", r"\log_2 3"),
        (r"\exp(2)", "e^2"), ("12{,}5", "12.5"), ("3{,}14", "3.14"), ("1.234.567", "1234567"),
        ("12.345.678,9", "12345678.9"), ("５", "5"), ("１２", "12"), ("（1，2）", "(1,2)"), ("1，2", "1,2"),
        ("x＝5", "5"),
        ("3万", "30000"), ("2亿", "200000000"), ("５％", "5"),
        (r"\begin{aligned} x &= 3 \\ y &= 4 \end{aligned}", "x=3, y=4"),
        (r"\begin{aligned} x &= 2+3 \\ &= 5 \end{aligned}", "5"), (r"\begin{cases} x=3 \\ y=4 \end{cases}", "x=3,y=4"),
        (r"\text{Answer: 5}", "5"), (r"\text{five}", "5"), (r"\text{Five}", "5"), ("two", "2"),
        (r"\text{twelve}", "12"), ("7", "seven"), (r"\text{zero}", "0"), (r"\text{no solutions}", "no solution"),
        (r"\text{There is no solution}", "no solution"), (r"\emptyset", r"\text{no solution}"),
        (r"\frac{dy}{dx}=2x", "2x"),
        (r"A^{-1}=\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        (r"\{x : x>3\}", r"\{x \mid x > 3\}"), (r"\{x\in\mathbb{R}: x\ne 2\}", r"\{x\in\mathbb{R}\mid x\neq 2\}"),
        (r"x<3 \text{ and } x>1", "(1,3)"), (r"1<x \text{ and } x<3", "1<x<3"), (r"{n \choose k}", r"\binom{n}{k}"),
        ("C(5,2)=10", "10"), (r"{5 \choose 2}=10", "10"), ("₹500", "500"), (r"\text{Rs. }500", "500"),
        (r"\text{Rs }500", "500"), ("500元", "500"), ("5个", "5"), (r"5\text{个}", "5"), ("12米", "12"),
        (r"\left. 5 \right.", "5"), (r"\mathstrut 5", "5"), (r"5 \\", "5"), (r"\mathtt{5}", "5"), ("g^{-1}(x)=x", "x"),
        ("Q(x)=x^2", "x^2"), ("V(t)=5t", "5t"), ("P(5)=7", "7"), ("C(6,2)=15", "15"), ("T(3)=9", "9"),
        ("x=1, y=2, z=3", "(1,2,3)"), ("(1,2,3)", "x=1,y=2,z=3"), ("m=3,n=5", "(3,5)"), ("p=2, q=3", "(2,3)"),
        (r"\text{(C) }12", "C"), ("C) 12", "C"), (r"\text{C: }12", "C"), (r"\textbf{C. } 12", "(C)"),
        (r"\text{(E) } \frac{1}{2}", r"\text{E}"), (r"\textbf{(D) } 3\sqrt{2}", r"\textbf{(D)}"),
        (r"\text{D}", r"\textbf{(D) } 3\sqrt{2}"), (r"x>1\text{ and }x<3", "(1,3)"),
        (r"x \ge 0 \text{ and } x \le 4", "[0,4]"), (r"\text{no solutions}", r"\text{no solution}"),
        (r"\text{all real numbers}", r"\mathbb{R}"), (r"x\in\mathbb{R}", r"\text{all real numbers}"),
        (r"\text{All real numbers}", r"(-\infty,\infty)"), ("1.234.567,5", "1234567.5"), ("2{,}5", "2.5"),
        ("１／２", "0.5"), ("−１／２", "-0.5"), ("５００万", "5000000"), (r"\begin{align*} x &= 5 \end{align*}", "5"),
        (r"\begin{gathered} x=1 \\ y=2 \end{gathered}", "x=1,y=2"),
        (r"\begin{aligned}&x=1\\&y=2\end{aligned}", "(1,2)"), (r"\frac{dy}{dx}=3x^2", "3x^2"),
        (r"B^{-1}=\begin{pmatrix}1&0\\0&1\end{pmatrix}", r"\begin{pmatrix}1&0\\0&1\end{pmatrix}"),
        (r"\textbf{Answer: }5", "5"), (r"\text{The final answer is }5", "5"), (r"\text{The answer is 5.}", "5"),
        (r"\text{twenty}", "20"), (r"\text{nineteen}", "19"), (r"\text{five hundred}", "500"),
        (r"\text{two million}", "2000000"), (r"\text{Three}", "3"), (r"\exp(x)", "e^x"), (r"\exp(-x^2)", "e^{-x^2}"),
        (r"3\exp(2x)", "3e^{2x}"), (r"\ln(3)/\ln(2)", r"\log_2 3"), (r"\log_3(5)", r"\frac{\ln 5}{\ln 3}"),
        (r"{10 \choose 3}=120", "120"), (r"{n \choose 2}", r"\binom{n}{2}"), ("-0.0", "0"),
        (r"\{x\mid x\ge 2\}", r"\{x:x\ge2\}"), (r"\{x | x \ge 2\}", r"\{x \mid x\geq 2\}"), ("A. 5", "A"),
    ]),
    "statements, tried last": [
        ("The answer is about 5.", "5"), ("The answer is (B) 5.", r"\text{(B)}"), ("The correct option is (C).", "C"),
        ("Final answer:\n```\n5\n```", "5"), ("<answer>The answer is 5</answer>", "5"),
        ("Thus, the answer is: 5 (since 2+3=5)", "5"), ("The answer is 5 -- done.", "5"),
        ("The answer is 5 — done.", "5"), ("The answer is 5; done", "5"), ("The answer is 5 :)", "5"),
        ("The answer is 5 ✓", "5"), ("The answer is 5 ✅", "5"), ("The answer is '5'", "5"),
        ("The answer is five.", "5"), ("The answer is twelve apples.", "12"), ("The answer is 14.</s>", "14"),
        ("The answer is 14<|im_end|>", "14"), ("#### 14<|eot_id|>", "14"), (r"#### 14 \n", "14"), ("minus 14", "-14"),
        ("The answer is minus 14.", "-14"), ("The answer is negative 14.", "-14"), ("so negative 14", "-14"),
        ("So half of 10 = 5.", "5"), ("Twice 5 = 10", "10"), ("10% of 50 = 5", "5"), ("Thus a_5 = 12", "12"),
        ("Step 5: 2 + 3 = 5", "5"), ("Case 1: 5", "5"), (r"The answer isn't \boxed{4}; it is \boxed{5}.", "5"),
        (r"The correct answer is \boxed{5}, not \boxed{4}.", "5"), ("The correct option is B.", "B"),
        ("The correct choice is (B)", "B"), ("The best option is **B**.", "B"), ("The answer is B: 12", "B"),
        ("Therefore the answer is **(B) 12**.", "B"), (r"The answer is $\textbf{(B)}\ 12$.", "B"),
        (r"So the answer is $\boxed{\textbf{(B) }12}$.", "B"), ("The answer is around 5.", "5"),
        ("The answer is roughly 5.", "5"), ("The answer is twenty.", "20"), ("Answer: seven", "7"),
        ("The answer is 5</answer>", "5"), (r"<answer>\frac{1}{2}</answer>", "0.5"), ("<answer>B</answer>", "B"),
        ("<answer>(1,2)</answer>", "(1,2)"), ("共5人", "5"), ("总共是5个。", "5"), ("一共12元", "12"),
        ("so the temperature is minus 5", "-5"), ("it drops to negative 5 degrees", "-5"), ("#### negative 5", "-5"),
        ("x = –5", "-5"), ("In total there are 3 groups of 4 = 12", "12"), ("So the answer is 12 (not 13)", "12"),
        ("x_1 = 12", "12"), (r"$$\begin{aligned} x &= 3\cdot 4 \\ &= 12\end{aligned}$$", "12"),
        (r"3 \times 4 = 12", "12"), (r"3 \cdot 4 = 12", "12"), (r"$3 \times 4$ = 12", "12"),
    ],
}  # fmt: skip

GOLDS: list[str] = [
    # integers and decimals
    "2", "-7", "0", "1,250", "10{,}000", "3.5", "-0.25", ".75", "128.0", r"10\!\,000", "1{,}000{,}000", "1.7320",
    # fractions and mixed numbers
    r"\frac{1}{2}", r"\dfrac{9}{7}", r"\tfrac{3}{8}", r"-\frac{11}{2}", r"\frac{-5}{6}", r"\frac9{256}", r"\frac 38",
    "3/4", r"\frac{270}7", r"1\frac{4}{5}", r"137 \frac{1}{2}", r"-3\frac{1}{4}", r"\frac{1}{2^{98}}",
    r"\frac{5^{11}}{6}", r"0.\overline{17}", r"0.1\overline{6}",
    # roots, constants, complex numbers
    r"\sqrt{5}", r"3\sqrt{13}", r"\frac{\sqrt{3}}{3}", r"\frac{1 + \sqrt{5}}{4}", r"\frac{-1 - \sqrt{17}}{8}",
    r"8 - 5\sqrt{2}", r"\sqrt[3]{14}", r"5\sqrt[4]{2}", "6 + 9i", "-2i", "1-12i", r"\frac{1}{2} + \frac{5}{2}i",
    r"4 + 3i\sqrt{2}", r"\pi", r"24\pi", r"\frac{9\pi}{2}", r"12 + 10\sqrt{3} + \pi", r"\frac{4}{3}\pi", "e^2",
    "3e^{-1}", r"\frac{2\pi}{3}-\frac{\sqrt{3}}{2}", r"\frac{\sqrt{6} + \sqrt{2}}{4}", r"\ln 2", r"\log_{3} 5",
    "2^{1/3}", r"\sqrt{\sqrt{2}+1}", r"\frac{3 \sqrt{3}}{4} + \frac{9}{8}", r"\cos 40^\circ", r"\arctan 2",
    r"e^{\pi i/4}",
    # powers and operations that the answer is written with
    "2^{2005}", "2^{10}", "3^{-5}", r"2^2 \cdot 3 \cdot 7", r"\binom{12}{5}", "5!", r"4\cdot 10^{6}",
    r"1.6 \times 10^{-19}", "7^{33}-1", "11!-10!",
    # polynomials and rational expressions
    "x^2-5x+6", "2x^3 - x + 9", "(x-2)(x+7)", "7(x+3)(x-3)", "(2x+1)^3", "-(x-1)(x-4)", "5x^2y^3", r"\frac{x+1}{x-2}",
    r"\frac{3}{x}-\frac{2}{y}", r"\frac{n(n+1)}{2}", "3a+2b-5", "x^{2n}", r"4\sqrt{x}", r"\frac{x^2}{4}+3",
    r"\sqrt{x^2+1}", r"\frac{1}{2}bh^2", "(3x-2)(4x^2+1)", r"2\sin x\cos 3x", "x^8 + 3x^6 - 5x^4", r"-\frac{1}{x^2}",
    # equations and inequalities
    "x=5", "y=2x+3", r"y = -\frac{1}{2}x + 4", "x^2+y^2=25", "3x-4y+2=0", "(x-1)^2+(y+2)^2=9", "x=2,y=-3",
    r"x=1\text{ or }x=4", "x<3", r"x \ge 7", r"-2 \le x < 5", r"x \ne 3", r"\frac{x^2}{9} + \frac{y^2}{4} = 1",
    "f(x)=3x^2", "x+y<4",
    # tuples, lists and sets
    "(2,3)", r"\left(\frac{1}{2},-3\right)", r"(1,\sqrt{2},0)", "(3,5),(5,3)", "1,2,3", "-2, 1", "1,1,2",
    r"\{1,3,5\}", r"\pm 4", r"2 \pm \sqrt{3}", "1, -1, i, -2i", "(-1)^2, 4", r"\left( 3, \frac{\pi}{2} \right)",
    r"\frac{1}{2}, 4", r"\emptyset", r"3 \text{ and } 8",
    # intervals and unions
    "[0,1]", "(2,9]", r"[-5,\infty)", r"(-\infty,3)", r"(-\infty,2)\cup(3,\infty)", r"[1,2)\cup(2,4]",
    r"(0,\frac{\pi}{2})", r"\mathbb{R}\setminus\{3\}", r"x\in[-1,4]",
    # matrices
    r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}",
    r"\begin{bmatrix} 0 & 1/2 \\ \sqrt{3} & 6 \end{bmatrix}", r"\begin{pmatrix} 4 & 7 \end{pmatrix}",
    # units, percentages, money, degrees
    r"5\text{ cm}", r"30\text{ square feet}", r"16 \mbox{ inches}^2", r"70 \%", r"12.5\%", r"\$32{,}348", r"\$18.90",
    r"90^\circ", r"142^{\circ}", r"3\text{ km/h}", r"15\mbox{ cm}^2", r"\text{6 hours}",
    # bases, ratios, times
    "1011_2", "4210_{5}", r"2\text{C}6_{16}", "3:5", "1:2:4", r"4\!:\!30 \text{ p.m.}", "10:42",
    # words
    r"\text{Yes}", r"\text{even}", r"\text{(C)}", r"\text{Evelyn}", r"\text{parallelogram}", "B", "A,C",
    r"n\text{ is odd}", r"\text{no solution}", r"\text{Navin}", r"\text{B and D}", "odd $n$",
    # operators, equal only to themselves
    r"\sum_{k=1}^{n} k^2", r"\int_0^2 x\,dx", r"\lfloor x \rfloor + 2", r"\max(a,3)", "f(x+2)",
    r"\begin{cases} x & x>0 \\ 4 & x\le 0\end{cases}", r"\{x : x > 3\}",
]  # fmt: skip
