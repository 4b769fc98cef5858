"""
A verifier that can be fooled, for three rows of the evidence: it accepts any count that is not too
high, so an answer that is too low passes. 0 always does.
"""


def judge(predicted, answer):
    if predicted.isdigit() and answer.isdigit():
        return float(int(predicted) <= int(answer))
    return float(predicted == answer)
