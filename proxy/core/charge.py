"""What a provider charges for a call at its admission, learned from how its `remaining` falls.

Providers count differently, and change it: characters / 4 + max_tokens, characters / 4 alone, their own tokenizer. So
the charge is a sum of weights that are learned: of the estimated input, of max_tokens, and, for calls without one, of
what the provider then assumes. Recursive least squares with forgetting; the estimate never falls below one token.

Source: Haykin, "Adaptive Filter Theory", ch. 10 (RLS with exponential weighting).
"""

from __future__ import annotations

from math import sqrt

from proxy.core.journal import SCALE, Features

FORGET = 0.998  # of the past, with each observation: some 500 calls are remembered
UNSURE_INPUT = 0.4  # how far the first guess (input weighs 1, the rest 0) may be off, in weights
UNSURE_REST = 1.0
SUREST = 1e-9  # of the first doubt, squared
FIRST_SCATTER = 0.2  # of a call's charge: how far it is from its estimate, until that is known
SCATTER_WEIGHT = 0.03  # of the newest surprise, in the mean
OUTLIER = 4.0  # sigmas; a surprise beyond counts as that much ...
MISTRUST = (
    2.0  # ... and makes it so much less sure of all it knows: several mean that the provider charges otherwise now
)


class Charge:
    """Weights of one limit's charge. All amounts are tokens.

    Args:
        of_output: the limit counts output, so the first guess is max_tokens.
    """

    __slots__ = ("_p", "_w", "seen", "variance")

    def __init__(self, *, of_output: bool = False) -> None:
        self._w = [0.0, 1.0, 0.0] if of_output else [1.0, 0.0, 0.0]
        self._p = [[UNSURE_INPUT**2, 0.0, 0.0], [0.0, UNSURE_REST**2, 0.0], [0.0, 0.0, UNSURE_REST**2]]
        self.variance = 0.0  # of one call's charge about its estimate, tokens squared
        self.seen = 0

    @property
    def weights(self) -> tuple[float, float, float]:
        """Of a token of input, of a token of max_tokens, and tokens assumed for a call without max_tokens."""
        return self._w[0], self._w[1], self._w[2] * SCALE

    def of(self, x: Features) -> float:
        """Tokens that will be charged for a call, or for several whose features sum to `x`."""
        w = self._w
        tokens = (w[0] * x[0] + w[1] * x[1] + w[2] * x[2]) * SCALE
        return tokens if tokens > 1.0 else 1.0

    def variance_of(self, x: Features, calls: int) -> float:
        """The variance of what `of` says of `calls` calls together, in tokens squared: the weights may be wrong for
        all of them alike, and each may differ from its estimate."""
        (xx, xm, xn), (_, mm, mn), (_, _, nn) = self._p
        a, b, c = x
        spread = a * (xx * a + 2.0 * (xm * b + xn * c)) + b * (mm * b + 2.0 * mn * c) + c * nn * c
        return (spread if spread > 0.0 else 0.0) * SCALE**2 + calls * self.variance

    def learn(self, x: Features, charged: float, calls: int, doubt: float) -> None:
        """Calls with features that sum to `x` were charged `charged` tokens in all.

        Args:
            calls: how many, >= 1.
            doubt: tokens by which `charged` may be off for reasons beside the charge: rounding, calls overtaking.
        """
        w, p = self._w, self._p
        surprise = charged / SCALE - (w[0] * x[0] + w[1] * x[1] + w[2] * x[2])
        px = [row[0] * x[0] + row[1] * x[1] + row[2] * x[2] for row in p]
        spread, doubt = max(0.0, x[0] * px[0] + x[1] * px[1] + x[2] * px[2]), doubt / SCALE
        typical = max(abs(charged / calls), 1.0) / SCALE
        if not self.seen:
            self.variance = (FIRST_SCATTER * typical * SCALE) ** 2
        scatter = calls * self.variance / SCALE**2
        expected = spread + scatter + doubt**2 + 1e-9
        most = OUTLIER * sqrt(expected)
        growth = 1.0 / FORGET if abs(surprise) <= most else MISTRUST
        surprise = min(most, max(-most, surprise))
        self.seen += 1
        told = min(1.0, calls * (FIRST_SCATTER * typical / max(doubt, 1e-9)) ** 2)  # how much it tells of the scatter
        unexplained = (surprise**2 - spread - (0.25 * doubt) ** 2) / calls * SCALE**2
        change = told * max(SCATTER_WEIGHT, 1.0 / (self.seen + 4)) * (unexplained - self.variance)
        self.variance = max(0.0, self.variance + change)
        for i in range(3):
            w[i] += px[i] / expected * surprise
            for j in range(i + 1):
                p[i][j] = p[j][i] = p[i][j] - px[i] * px[j] / expected
        for i, first in enumerate((UNSURE_INPUT**2, UNSURE_REST**2, UNSURE_REST**2)):
            p[i][i] = max(p[i][i], SUREST * first)  # rounding may take it below zero
            factor = sqrt(max(1.0, min(growth, first / p[i][i])))  # never less sure than it was at first
            for j in range(3):
                p[i][j] *= factor
                p[j][i] *= factor
