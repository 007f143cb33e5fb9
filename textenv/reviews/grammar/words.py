"""The words that do not depend on an aspect: degrees, negations, verdicts, links. Data, and no logic.

A number beside a phrase is its factor or its value: +1 praises without reserve, -1 blames without
reserve. {it} {them} {this} {s} {es} {is} {was} {has} follow the number of what they speak of.
"""

from __future__ import annotations

PLAIN, EXTREME, MILD, FIXED = 0.75, 1.0, 0.45, 0.8  # strength of the four kinds of adjective

# Adjectives that fit every aspect marked generic.
GENERIC_GOOD = "good, !great, !excellent, !superb, ~decent, ~fine"
GENERIC_BAD = "poor, disappointing, !terrible, !awful, ~mediocre"

# degree word -> factor on a gradable adjective's strength, split by what it may stand before
DEGREES = {
    "very": 1.2,
    "really": 1.2,
    "so": 1.2,
    "quite": 1.0,
    "pretty": 1.0,
    "fairly": 0.8,
    "surprisingly": 1.0,
}
BAD_DEGREES = {"a bit": 0.6, "a little": 0.6, "rather": 0.9}
EXTREME_DEGREES = {"absolutely": 1.0, "simply": 1.0, "really": 1.0}

VERBS = ("{is}", "seem{s}")
# negation -> factor; "not exactly quiet" blames less than "far from quiet"
NEGATIONS = {
    "{is} not": 0.8,
    "{is}n't": 0.8,
    "{is} not exactly": 0.6,
    "{is} not particularly": 0.6,
    "{is}n't very": 0.6,
    "{is} not at all": 1.1,
    "{is} hardly": 0.9,
    "{is} far from": 1.1,
    "{is} anything but": 1.2,
}

# said before "the lid"
JUDGEMENTS = {
    "I really like": 0.9,
    "I am happy with": 0.8,
    "I cannot fault": 0.8,
    "I was impressed by": 0.9,
    "I have no complaints about": 0.7,
    "the best part is": 0.9,
    "what I like most is": 0.9,
    "I do not like": -0.8,
    "I am not happy with": -0.8,
    "I was let down by": -0.9,
    "I am disappointed with": -0.8,
    "my only complaint is": -0.6,
    "the weak point is": -0.7,
    "the worst part is": -0.9,
}
# said after "the lid"
VERDICTS = {
    "{is} better than I expected": 0.8,
    "{is} the best part": 0.9,
    "{is} all I hoped for": 0.9,
    "{is} good enough for me": 0.5,
    "could not be better": 1.0,
    "{is} worse than I feared": -0.9,
    "let me down": -0.8,
    "could be better": -0.5,
    "need{s} work": -0.6,
    "{is} nothing special": -0.4,
}
# clauses on the product as a whole
OVERALL = {
    "I love {them}": 0.9,
    "I would buy {them} again": 0.8,
    "I am glad I bought {them}": 0.8,
    "I recommend {them}": 0.8,
    "I can recommend {them} to anyone": 0.9,
    "I could not be happier": 1.0,
    "I would not trade {them} for anything": 1.0,
    "you will not regret {them}": 0.7,
    "{it} {was} worth the wait": 0.8,
    "{it} do{es} the job": 0.5,
    "I would not buy {them} again": -0.8,
    "I do not recommend {them}": -0.8,
    "I cannot recommend {them}": -0.8,
    "I regret buying {them}": -0.9,
    "I am sending {them} back": -0.9,
    "I want my money back": -1.0,
    "I expected more": -0.5,
    "I gave up on {them}": -0.9,
    "{it} ended up in the closet": -0.7,
    "{it} {was} a waste of money": -1.0,
}
OVERALL_GOOD = "good, great, solid, excellent, fantastic, lovely"
OVERALL_BAD = "poor, terrible, bad, awful, useless, disappointing"

# said before a whole clause, no comma: factor on the clause's value
HEDGES = {"I think": 0.9, "I must say": 1.0, "I would say": 0.9, "I find that": 0.9}
DENIAL = "I cannot say that"  # stands before praise and turns it round
DENIAL_FACTOR = -0.8

# said before a whole sentence, with a comma: the sign that the clause must have (0 = either)
INTROS = {
    "so far": 0,
    "after two weeks": 0,
    "to be honest": 0,
    "honestly": 0,
    "in my opinion": 0,
    "to my surprise": 0,
    "overall": 0,
    "in short": 0,
    "still": 0,
    "however": 0,
    "that said": 0,
    "luckily": 1,
    "thankfully": 1,
    "sadly": -1,
    "unfortunately": -1,
}
TURNS = ("still", "however", "that said")  # intros that need a sentence before them to turn away from
STATES = ("so far", "after two weeks", "in my opinion")  # intros for what is so, not for what happened
SUMS = ("overall", "in short")  # intros for the product as a whole

# between two clauses: the sign of the product of their values; a must for -1, a habit for +1
LINKS = {" and ": 1, ", and ": 1, ", but ": -1, ", though ": -1, ", yet ": -1}
CONCESSIONS = ("although", "while", "even though")  # "although A, B": signs differ
REASON, RESULT = " because ", ", so "  # overall because aspect; aspect, so overall: signs agree
EXCEPTIONS = {"apart from": 0.5, "despite": 0.5}  # "apart from the lid, I love it": the lid is to blame
CONCEDED = 0.8  # factor on a claim that its own sentence turns away from

# sentences that tell a fact and judge nothing
NEUTRAL = (
    "I bought {this} {product} for {person}",
    "I got {this} {product} as a gift",
    "I have had {this} {product} for {time}",
    "we have used {this} {product} for {time}",
    "I use {them} {often}",
    "we use {them} {often}",
    "I ordered {them} for {person}",
)
PERSON = ("my sister", "my mother", "my son", "a friend", "our new home")
TIME = ("two weeks", "a month", "half a year")
OFTEN = ("every day", "twice a week", "all the time")
