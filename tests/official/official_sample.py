"""Searches in the raw format of the CPO paper's own program, written by hand as that program would have written them."""

import json

QUESTION = "Who was born first, the founder of Versus or J. R. R. Tolkien?"
# chains are glued without a blank; in the last level quotes, hyphens and double blanks are gone
FOUNDER = 'answer: step 1, who founded versus? "gianni versace" did,  in 1978.'
STEPMOTHER = "answer: step 1, when was tolkien's stepmother born? nobody knows."
FOUNDER_BORN = FOUNDER + "step 2, when were they born? tolkien in 1892 - long before versace."
FOUNDER_1946 = FOUNDER + "step 2, versace was born in 1946."
STEPMOTHER_X = STEPMOTHER + "step 2, so x = y."
LAST = "answer: step 1, who founded versus? 'gianni versace' did, in 1978."
WIN = LAST + "step 2, when were they born? tolkien in 1892 long before versace."
WIN += "step 3, so the final answer is: j. r. r. tolkien."
WIN_TOO = LAST + "step 2, versace was born in 1946.step 3, so the final answer is: the J. R. R. Tolkien"
LOSE = LAST + "step 2, versace was born in 1946.step 3, so the final answer is: versace."
OPEN = LAST + "step 2, versace was born in 1946.step 3, nobody can tell."

SEARCH = {
    "0": {"candiate": [FOUNDER, STEPMOTHER], "values": [4.001, 0.005]},
    "1": {"candiate": [FOUNDER_1946, FOUNDER_BORN, STEPMOTHER_X], "values": [2.003, 5, 0.005]},
    "2": {"candiate": [LOSE, WIN, WIN_TOO, OPEN], "values": [1.004, 4.001, 3.002, 0]},
    "correct": [WIN, WIN_TOO],
}
MATH_QUESTION = "Leah had 32 chocolates and ate 35 less 10.How many are left?"
LEAH = "step 1, leah ate 35 - 10 = 25 chocolates. "
LEFT = LEAH + "step 2, 32 - 25 = 7 are left."
NUMBER = "step 3, the answer (arabic numerals) is "
MATH = {
    "0": {"candiate": [LEAH, "step 1, x. "], "values": [5, 1.004]},
    "1": {"candiate": [LEFT], "values": [5]},
    "2": {
        "candiate": [f"{LEFT}{NUMBER}7. ", f"{LEFT}{NUMBER}7.0", f"{LEFT}{NUMBER}1,912"],
        "values": [5, 2.003, 1.004],
    },
    "correct": [f"{LEFT}{NUMBER}7. "],
}


def written(*entries, opening="", closing=""):
    """Text of a file: each {question: search} as the program appends it; no brackets unless given."""
    body = "".join(json.dumps(entry, ensure_ascii=False, indent=1) + ",\n" for entry in entries)
    return opening + body + closing
