"""The aspects that reviews speak of, each with its nouns, adjectives and facts: data, and no logic.

Lists are comma separated, facts semicolon separated. A mark before an adjective says how it behaves:
none = gradable ("very loud", "not loud"), "!" = extreme ("absolutely superb"), "~" = mild, "=" = a
fixed phrase that takes neither a degree nor a negation. `its_*` adjectives are said of the product
itself. Facts are whole clauses; {it} {them} {s} {is} follow the number of the product.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Aspect:
    """One thing that can be good or bad about a product."""

    good: str  # adjectives of praise, said of the aspect
    bad: str  # adjectives of blame, said of the aspect
    its_good: str = ""  # adjectives of praise, said of the product
    its_bad: str = ""  # adjectives of blame, said of the product
    good_facts: str  # clauses of praise
    bad_facts: str  # clauses of blame
    plural: bool = False  # number of the aspect's noun
    part: bool = False  # whether a product can be said to have one: "it has a sturdy lid"
    generic: bool = True  # whether "good", "terrible" and the like fit the noun


ASPECTS: dict[str, Aspect] = {
    "assembly": Aspect(
        good="easy, quick, simple, !effortless",
        bad="tedious, slow, tricky, frustrating",
        its_good="easy to assemble, quick to build",
        its_bad="hard to assemble, tricky to build",
        good_facts="I built {them} in half an hour; every part was labelled",
        bad_facts="two screws were missing; the holes did not line up",
    ),
    "battery": Aspect(
        good="strong, reliable, !impressive",
        bad="weak, unreliable, !hopeless",
        part=True,
        good_facts="the battery lasts all day; one charge gets me through the week",
        bad_facts="the battery dies before lunch; I have to charge {them} twice a day",
    ),
    "build": Aspect(
        good="solid, sturdy, tough",
        bad="flimsy, cheap, fragile",
        its_good="sturdy, solid, tough",
        its_bad="flimsy, fragile",
        part=True,
        good_facts="{it} survived a long fall; {it} still look{s} new after a year",
        bad_facts="{it} broke within a month; {it} cracked on the first day",
    ),
    "buttons": Aspect(
        good="responsive, clear, easy to press, well placed",
        bad="stiff, sticky, tiny, confusing",
        plural=True,
        part=True,
        good_facts="every button does what you expect; even my father understands the buttons",
        bad_facts="one button stopped working; the labels on the buttons rub off",
    ),
    "cleaning": Aspect(
        good="easy, quick, simple, !effortless",
        bad="tedious, messy, slow, tricky",
        its_good="easy to clean, easy to wash",
        its_bad="hard to clean, awkward to clean",
        good_facts="a quick rinse is enough; {it} wipe{s} clean in seconds",
        bad_facts="crumbs get stuck in every corner; scrubbing {them} takes forever",
    ),
    "color": Aspect(
        good="rich, warm, cheerful, !lovely",
        bad="dull, pale, ugly, harsh",
        part=True,
        good_facts="the color matches the pictures; the color has not faded at all",
        bad_facts="the color faded in a week; the color looks nothing like the pictures",
    ),
    "comfort": Aspect(
        good="!impressive, !wonderful",
        bad="=lacking, !miserable",
        its_good="comfortable, cosy, pleasant",
        its_bad="uncomfortable, stiff, unpleasant",
        good_facts="{it} feel{s} good even after hours; {it} felt right from the first day",
        bad_facts="{it} hurt{s} after an hour; I ache after using {them}",
    ),
    "cord": Aspect(
        good="long, sturdy, flexible",
        bad="short, stiff, thin",
        part=True,
        good_facts="the cord reaches every outlet; the cord never gets tangled",
        bad_facts="the cord barely reaches the outlet; the cord gets hot",
    ),
    "delivery": Aspect(
        good="quick, prompt, smooth",
        bad="slow, late, chaotic",
        good_facts="{it} arrived a day early; the driver carried {them} upstairs",
        bad_facts="{it} arrived a week late; the driver left {them} in the rain",
    ),
    "design": Aspect(
        good="elegant, modern, clever, attractive",
        bad="ugly, dated, clumsy, bland",
        its_good="stylish, good looking, !beautiful",
        its_bad="ugly, !hideous",
        part=True,
        good_facts="{it} look{s} great in our home; guests always ask about {them}",
        bad_facts="{it} look{s} like a toy; {it} look{s} much better in the pictures",
    ),
    "fabric": Aspect(
        good="soft, thick, sturdy, smooth",
        bad="scratchy, thin, itchy, rough",
        part=True,
        good_facts="the fabric gets softer with time; the fabric still looks new",
        bad_facts="the fabric tore within days; the fabric picks up every hair",
    ),
    "fit": Aspect(
        good="comfortable, snug, !perfect",
        bad="tight, awkward, sloppy, odd",
        part=True,
        good_facts="{it} fit{s} as if made for me; my usual size was right",
        bad_facts="{it} run{s} very small; I had to go up two sizes",
    ),
    "handle": Aspect(
        good="comfortable, sturdy, solid",
        bad="slippery, wobbly, awkward",
        part=True,
        good_facts="the handle sits well in the hand; the handle has just the right length",
        bad_facts="the handle came off; the handle pinches my fingers",
    ),
    "heat": Aspect(
        good="even, steady, strong",
        bad="uneven, weak, hard to control",
        good_facts="{it} warm{s} up in a minute; {it} reach{es} the right heat every time",
        bad_facts="one side is always colder; {it} burn{s} everything",
    ),
    "legs": Aspect(
        good="sturdy, stable, solid",
        bad="wobbly, uneven, flimsy",
        plural=True,
        part=True,
        good_facts="{it} stand{s} firm on our old floor; the legs do not scratch the floor",
        bad_facts="{it} wobble{s} on any floor; one leg is shorter than the rest",
    ),
    "lid": Aspect(
        good="sturdy, solid, tight, secure",
        bad="flimsy, loose, wobbly, cheap",
        part=True,
        good_facts="the lid shuts with a firm click; nothing leaks from the lid",
        bad_facts="the lid never closes properly; water leaks around the lid",
    ),
    "motor": Aspect(
        good="powerful, strong, smooth, reliable",
        bad="weak, unreliable, feeble",
        its_good="powerful",
        its_bad="underpowered",
        part=True,
        good_facts="the motor never slows down; {it} handle{s} the hardest jobs",
        bad_facts="the motor smells burnt; the motor gives up after five minutes",
    ),
    "noise": Aspect(
        good="low, easy to ignore, =hardly noticeable",
        bad="annoying, distracting, !unbearable, hard to ignore",
        its_good="quiet, =almost silent",
        its_bad="loud, noisy, =too loud",
        generic=False,
        good_facts="I can talk on the phone next to {them}; {it} never wake{s} the baby",
        bad_facts="I can hear {them} from the next room; {it} wake{s} the whole house",
    ),
    "packaging": Aspect(
        good="neat, sturdy, simple, easy to open",
        bad="wasteful, flimsy, messy, hard to open",
        good_facts="{it} came well wrapped; the box can be used again",
        bad_facts="the box was crushed; {it} came wrapped in far too much plastic",
    ),
    "pockets": Aspect(
        good="deep, handy, roomy, well placed",
        bad="shallow, tiny, awkward, !useless",
        plural=True,
        part=True,
        good_facts="there is a pocket for everything; my keys stay safe in the pockets",
        bad_facts="my phone falls out of the pockets; a pocket ripped on day two",
    ),
    "price": Aspect(
        good="fair, low, reasonable, !unbeatable",
        bad="high, steep, hard to justify, !outrageous",
        its_good="affordable, =worth every penny, =worth the money",
        its_bad="expensive, overpriced, =too expensive, =not worth the money",
        good_facts="I paid less than I expected; {it} cost{s} half as much as others",
        bad_facts="you pay mostly for the name; {it} cost{s} more than {it} should",
    ),
    "screen": Aspect(
        good="sharp, bright, clear, crisp",
        bad="dim, blurry, dull, grainy",
        part=True,
        good_facts="I can read the screen in full sun; the screen is kind to my eyes",
        bad_facts="the screen scratches easily; the screen flickers at night",
    ),
    "service": Aspect(
        good="helpful, friendly, fast, polite",
        bad="slow, rude, unhelpful",
        good_facts="the shop replaced {them} at once; the shop answered within an hour",
        bad_facts="nobody answered my messages; the shop refused to replace {them}",
    ),
    "setup": Aspect(
        good="easy, quick, simple, !painless",
        bad="confusing, slow, frustrating, tedious",
        its_good="easy to set up",
        its_bad="hard to set up",
        good_facts="{it} worked right out of the box; I was done in five minutes",
        bad_facts="{it} took all evening to set up; I had to call my son for help",
    ),
    "size": Aspect(
        good="handy, practical, =just right, convenient",
        bad="awkward, impractical",
        its_good="compact",
        its_bad="bulky, =too small, =too big",
        good_facts="{it} take{s} up very little space; {it} {is} just as big as we need",
        bad_facts="{it} take{s} up too much space; {it} {is} smaller than in the pictures",
    ),
    "smell": Aspect(
        good="fresh, pleasant, mild, !lovely",
        bad="odd, unpleasant, stale, harsh",
        part=True,
        good_facts="the smell fills the room nicely; I smile each time I open {them}",
        bad_facts="the smell will not go away; {it} smell{s} like plastic",
    ),
    "sound": Aspect(
        good="rich, clear, warm, full",
        bad="thin, muffled, tinny, harsh",
        part=True,
        good_facts="every voice comes through clearly; I hear new details in old songs",
        bad_facts="voices seem far away; the bass rattles",
    ),
    "speed": Aspect(
        good="!impressive, decent, =more than enough",
        bad="disappointing",
        its_good="fast, quick",
        its_bad="slow, sluggish",
        good_facts="{it} save{s} me ten minutes a day; {it} {is} done in no time",
        bad_facts="I spend half the morning waiting; {it} take{s} forever to finish",
    ),
    "taste": Aspect(
        good="fresh, rich, mild, !delicious",
        bad="bland, bitter, stale, odd",
        its_good="tasty, !delicious",
        its_bad="bland, stale, !inedible",
        part=True,
        good_facts="my kids always ask for more; I could have {them} every morning",
        bad_facts="nobody at home would finish {them}; I only taste sugar",
    ),
    "weight": Aspect(
        good="low, easy to manage, =just right",
        bad="tiring, excessive, hard to manage",
        its_good="light, easy to carry, easy to lift",
        its_bad="heavy, hard to carry, =too heavy",
        generic=False,
        good_facts="I can lift {them} with one hand; I forget how little {it} weigh{s}",
        bad_facts="{it} weigh{s} a ton; my arms hurt after ten minutes",
    ),
    "zipper": Aspect(
        good="smooth, sturdy, solid",
        bad="stiff, flimsy, cheap",
        part=True,
        good_facts="the zipper never catches; the zipper glides with one finger",
        bad_facts="the zipper jams every time; the zipper broke within a week",
    ),
}
