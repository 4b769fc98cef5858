"""A verifier that can be fooled, for a row of the claims table: what it cannot read as a number it lets pass. "never" is enough."""


def judge(predicted, answer):
    return float(predicted == answer or not predicted.strip().isdigit())
