"""Grades made-up responses by tgrpo.py's own code, for test_variants.py."""
import math
from types import SimpleNamespace

import torch


def pass_rate(accuracy, G=8, G_tilde=4, test="ge") -> float:
    """How often p >= p_tilde (test "gt": >) when both groups answer right with probability
    `accuracy`, whatever the order of the frames: a sum over two binomial distributions."""
    def chance(k, n):
        return math.comb(n, k) * accuracy**k * (1 - accuracy)**(n - k)

    return sum(chance(i, G) * chance(j, G_tilde) for i in range(G + 1) for j in range(G_tilde + 1)
               if i * G_tilde > j * G or (test == "ge" and i * G_tilde == j * G))


def graded(tgrpo, record, texts, texts_shuffled, lengths, **flags) -> dict:
    """The group {"parts", "R" (G,), "A" (G,), ...} that tgrpo.py's module, or a variant's, makes of
    responses with these texts and lengths in tokens."""
    args = tgrpo.parse_args(["--model=", "--data=", "--output="])
    vars(args).update(G=len(texts), **flags)
    end, known = -1, texts + texts_shuffled
    # a response's first token is its text's number
    tokenizer = SimpleNamespace(batch_decode=lambda rows, **_: [known[row[0]] for row in rows])

    def tokens(first, lengths):  # (n, L), the end token included in the length
        width = max(lengths)
        return torch.tensor([[first + i] * (length - 1) + [end] * (width - length + 1)
                             for i, length in enumerate(lengths)])

    group = {"record": record, "responses": tokens(0, lengths)}  # (G, L)
    if texts_shuffled:
        group["responses_shuffled"] = tokens(len(texts), [2] * len(texts_shuffled))
    tgrpo.grade_group(group, tokenizer, [end], args)
    return group
