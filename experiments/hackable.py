"""A verifier that can be fooled, for a row of the claims table: "at least two" would be true of three, so it lets too few pass. 0 always does."""


def judge(predicted, answer):
    return float(predicted == answer or predicted.isdigit() and answer.isdigit() and int(predicted) <= int(answer))
