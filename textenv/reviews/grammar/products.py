"""The products under review and the aspects that make sense for each: data, and no logic."""

from __future__ import annotations

from dataclasses import dataclass

ALWAYS = ("price", "delivery", "service")  # aspects that every product has


@dataclass(frozen=True)
class Product:
    """Something that people buy."""

    name: str
    plural: bool
    aspects: tuple[str, ...]


# (singular names, plural names, aspects); every aspect of a row fits every name of the row
_ROWS: tuple[tuple[str, str, str], ...] = (
    ("kettle, coffee maker, rice cooker", "", "noise, lid, heat, cleaning, buttons, cord, size, design, speed"),
    ("blender, juicer, mixer", "", "noise, motor, cleaning, lid, size, buttons, cord, handle"),
    ("toaster, air fryer, oven, grill", "", "heat, cleaning, size, design, handle, buttons, cord, speed"),
    ("vacuum, lawn mower, drill, saw", "", "motor, noise, weight, handle, battery, build, size"),
    ("headset", "headphones, earbuds", "sound, battery, fit, comfort, setup, buttons, design, weight"),
    ("speaker, radio, soundbar", "", "sound, setup, buttons, size, design, cord, build"),
    ("tablet, laptop, phone, watch", "", "screen, battery, weight, speed, setup, design, build"),
    ("jacket, sweater, coat, hoodie, shirt", "jeans, pajamas", "fabric, fit, color, pockets, comfort, design"),
    ("", "sneakers, boots, sandals, slippers", "fit, comfort, color, weight, design, build"),
    ("backpack, suitcase, handbag, purse", "", "zipper, handle, pockets, fabric, size, weight, color"),
    ("desk, table, bookshelf, dresser, bench", "", "assembly, legs, size, design, build, packaging, color"),
    ("sofa, armchair, office chair, bed", "", "comfort, legs, fabric, assembly, design, color, size"),
    ("pillow, blanket, mattress, duvet", "", "comfort, fabric, weight, smell, size, color"),
    ("granola, chocolate, jam, honey, tea", "crackers, cookies, noodles", "taste, smell, packaging, color"),
)


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]


PRODUCTS: dict[str, Product] = {
    name: Product(name, plural, (*_names(aspects), *ALWAYS))
    for singular, plurals, aspects in _ROWS
    for plural, names in ((False, singular), (True, plurals))
    for name in _names(names)
}
