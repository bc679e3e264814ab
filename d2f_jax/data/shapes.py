"""ShapesWorld: small ray-cast scenes with image, depth and caption, drawn from a seed.

One to three solids stand on a ground under a sky. The whole scene, its caption included, is a function of
`(seed, index)` and does not depend on the picture's size, so the same scene can be rendered at 48, 64 or 512
pixels. World coordinates: x to the right, y up, z away from the camera, the ground at y = 0; lengths in units
of roughly one object.
"""

import dataclasses

import numpy as np

SHAPES = ("sphere", "cube", "cylinder", "cone")
COLOURS = {
    "red": (0.86, 0.10, 0.10),
    "orange": (0.98, 0.50, 0.05),
    "yellow": (0.97, 0.86, 0.10),
    "green": (0.10, 0.58, 0.16),
    "cyan": (0.10, 0.78, 0.80),
    "blue": (0.10, 0.22, 0.88),
    "purple": (0.52, 0.14, 0.70),
    "white": (0.96, 0.96, 0.96),
}
SIZES = {"small": 0.60, "large": 0.98}  # half the height
GROUNDS = {
    "sand": (0.78, 0.66, 0.46),
    "grass": (0.38, 0.52, 0.22),
    "snow": (0.80, 0.84, 0.90),
    "tiles": (0.62, 0.58, 0.55),
}


@dataclasses.dataclass(frozen=True)
class Sky:
    """Linear RGB colours: `zenith` above, `horizon` below, `light` of sun or moon, `ambient` of the rest."""

    phrase: str
    zenith: tuple[float, float, float]
    horizon: tuple[float, float, float]
    light: tuple[float, float, float]
    ambient: tuple[float, float, float]
    elevation: float  # of the light above the horizon, radians


SKIES = (
    Sky("at noon", (0.20, 0.44, 0.86), (0.72, 0.86, 0.98), (1.00, 0.97, 0.90), (0.42, 0.45, 0.50), 0.95),
    Sky("at sunset", (0.32, 0.24, 0.52), (1.00, 0.58, 0.30), (1.02, 0.82, 0.64), (0.42, 0.37, 0.42), 0.50),
    Sky("at night", (0.02, 0.03, 0.10), (0.10, 0.14, 0.30), (0.70, 0.74, 0.88), (0.27, 0.29, 0.38), 0.80),
)


@dataclasses.dataclass(frozen=True)
class Solid:
    """One object; `size` is half its height, `turn` its rotation about the vertical in radians."""

    shape: str
    colour: str
    size_name: str
    size: float
    x: float
    z: float
    turn: float


@dataclasses.dataclass(frozen=True)
class Scene:
    solids: tuple[Solid, ...]  # from left to right in the picture
    ground: str
    sky: Sky
    azimuth: float  # of the light, radians from straight ahead
    caption: str


@dataclasses.dataclass(frozen=True)
class Rendering:
    """`image` uint8 [H, W, 3]; `depth` float32 [H, W], distance along the camera's axis, 0 in the sky."""

    image: np.ndarray
    depth: np.ndarray


_EYE = np.array([0.0, 2.3, -5.3], np.float32)
_TARGET = np.array([0.0, 0.85, 0.6], np.float32)
_HALF_FIELD = 0.47  # tangent of half the field of view
_FAR = 60.0
_NEVER = np.float32(1e9)  # the distance of what is not hit


def sample_scene(seed: int, index: int) -> Scene:
    """The scene with this index of the world with this seed; always the same one."""
    rng = np.random.default_rng((seed, index))
    count = rng.choice([1, 2, 3], p=[0.45, 0.35, 0.20])
    colours = rng.permutation(list(COLOURS))[:count]
    solids: list[Solid] = []
    while len(solids) < count:
        size_name = str(rng.choice(list(SIZES)))
        size = SIZES[size_name] * rng.uniform(0.92, 1.08)
        spread = 1.0 if count == 1 else 2.2
        solid = Solid(
            shape=str(rng.choice(SHAPES)),
            colour=str(colours[len(solids)]),
            size_name=size_name,
            size=size,
            x=rng.uniform(-spread, spread),
            z=rng.uniform(-1.0, 1.6),
            turn=rng.uniform(0, np.pi / 2),
        )
        inside = abs(_screen_x(solid)) + _screen_radius(solid) < _HALF_FIELD
        if inside and all(_apart(solid, other) for other in solids):
            solids.append(solid)
        elif rng.random() < 0.05:  # a corner was painted: begin again
            solids.clear()
    solids.sort(key=_screen_x)
    ground, sky = str(rng.choice(list(GROUNDS))), SKIES[rng.integers(len(SKIES))]
    azimuth = rng.uniform(0.5, 1.1) * rng.choice([-1, 1])
    caption = _caption(solids, ground, sky, with_sizes=rng.random() < 0.7, with_place=rng.random() < 0.7)
    return Scene(tuple(solids), ground, sky, azimuth, caption)


def render(scene: Scene, size: int = 64, supersample: int = 2) -> Rendering:
    """Ray-cast `scene` into a `size` x `size` picture, `supersample`² rays for every pixel."""
    n = size * supersample
    origin, direction = np.broadcast_to(_EYE, (n * n, 3)), _camera_rays(n)
    forward = _normalize(_TARGET - _EYE)
    distance, normal, owner = _trace(scene.solids, origin, direction)
    hit = distance < _FAR
    sun = _sun_direction(scene)
    colour = _sky_colour(scene, direction, sun)
    point = origin[hit] + distance[hit, None] * direction[hit]
    lit = _shade(scene, point, normal[hit], owner[hit], direction[hit], sun)
    haze = np.clip(distance[hit, None] / _FAR * 1.6, 0, 1) ** 1.5
    colour[hit] = lit + (np.asarray(scene.sky.horizon, np.float32) - lit) * haze
    depth = np.where(hit, distance * (direction @ forward), 0).reshape(n, n)
    pixels = np.clip(colour, 0, 1).reshape(size, supersample, size, supersample, 3).mean((1, 3))
    middle = supersample // 2  # depth is one sample: a mean over an edge would belong to neither side
    return Rendering(
        image=(pixels ** (1 / 1.25) * 255 + 0.5).astype(np.uint8),
        depth=np.ascontiguousarray(depth[middle::supersample, middle::supersample], np.float32),
    )


def _apart(a: Solid, b: Solid) -> bool:
    """Neither do they touch nor does one hide much of the other."""
    far_enough = np.hypot(a.x - b.x, a.z - b.z) > 1.25 * (a.size + b.size)
    return far_enough and abs(_screen_x(a) - _screen_x(b)) > 0.75 * (_screen_radius(a) + _screen_radius(b))


def _screen_x(solid: Solid) -> float:
    return solid.x / (solid.z - _EYE[2])


def _screen_radius(solid: Solid) -> float:
    return solid.size / (solid.z - _EYE[2])


def _caption(solids: list[Solid], ground: str, sky: Sky, with_sizes: bool, with_place: bool) -> str:
    names = [f"{s.size_name} {s.colour} {s.shape}" if with_sizes else f"{s.colour} {s.shape}" for s in solids]
    match [f"an {name}" if name[0] in "aeiou" else f"a {name}" for name in names]:
        case [one]:
            objects = one
        case [left, right]:
            objects = f"{left} left of {right}"
        case [left, middle, right]:
            objects = f"{left}, {middle} and {right}"
        case _:
            raise ValueError(f"a scene has one to three solids, not {len(names)}")
    return f"{objects} on {ground} {sky.phrase}" if with_place else objects


def _normalize(v: np.ndarray) -> np.ndarray:
    return v / np.sqrt((v * v).sum(-1, keepdims=True))


def _camera_rays(n: int) -> np.ndarray:
    """Unit directions [n*n, 3] through the pixels' centres, rows from the top."""
    forward = _normalize(_TARGET - _EYE)
    right = _normalize(np.cross(np.array([0, 1, 0], np.float32), forward))
    up = np.cross(forward, right)
    offset = ((np.arange(n, dtype=np.float32) + 0.5) / n * 2 - 1) * _HALF_FIELD
    rays = forward + offset[None, :, None] * right - offset[:, None, None] * up
    return _normalize(rays).reshape(n * n, 3).astype(np.float32)


def _sun_direction(scene: Scene) -> np.ndarray:
    """Towards the light, which stands behind the camera's shoulder so that the sides we see are lit."""
    e, a = scene.sky.elevation, scene.azimuth
    return np.array([np.cos(e) * np.sin(a), np.sin(e), -np.cos(e) * np.cos(a)], np.float32)


def _trace(
    solids: tuple[Solid, ...], origin: np.ndarray, direction: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nearest hit: distance [R], normal [R, 3] and owner [R]: the solid's index, -1 for the ground."""
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(direction[:, 1] < -1e-6, -origin[:, 1] / direction[:, 1], _NEVER)
    distance = np.where(distance > 1e-3, distance, _NEVER).astype(np.float32)
    normal = np.zeros_like(direction)
    normal[:, 1] = 1
    owner = np.full(len(direction), -1)
    for k, solid in enumerate(solids):
        near = _near(solid, origin, direction)
        t, facing = _intersect(solid, origin[near], direction[near])
        closer = t < distance[near]
        rows = np.flatnonzero(near)[closer]
        distance[rows], normal[rows], owner[rows] = t[closer], facing[closer], k
    return distance, normal, owner


def _near(solid: Solid, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Whether a ray meets the solid's bounding sphere: most do not, and need no further work."""
    to_centre = np.array([solid.x, solid.size, solid.z], np.float32) - origin
    along = np.einsum("ri,ri->r", to_centre, direction)
    off_axis = np.einsum("ri,ri->r", to_centre, to_centre) - along * along
    return (off_axis < 3.01 * solid.size**2) & (along > -2 * solid.size)


def _intersect(solid: Solid, origin: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance [R] to the solid (`_NEVER` where missed) and outward normal [R, 3], in world coordinates."""
    c, s = np.cos(solid.turn), np.sin(solid.turn)
    turn = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]], np.float32)
    o = (origin - np.array([solid.x, solid.size, solid.z], np.float32)) @ turn.T / solid.size
    d = direction @ turn.T
    with np.errstate(divide="ignore", invalid="ignore"):
        t, normal = _UNIT_SOLIDS[solid.shape](o, d)
    return np.where(np.isfinite(t) & (t > 1e-3), t * solid.size, _NEVER).astype(np.float32), normal @ turn


def _unit_sphere(o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    b = (o * d).sum(-1)
    t = -b - np.sqrt(b * b - (o * o).sum(-1) + 1)
    return t, o + t[:, None] * d


def _unit_cube(o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slab method; a little less wide than high, so that the corners stay inside the bounding sphere."""
    half = np.array([0.86, 1.0, 0.86], np.float32)
    near, far = (-np.sign(d) * half - o) / d, (np.sign(d) * half - o) / d
    axis = near.argmax(-1)
    t = near.max(-1)
    normal = np.zeros_like(d)
    rows = np.arange(len(d))
    normal[rows, axis] = -np.sign(d[rows, axis])
    return np.where(t < far.min(-1), t, np.nan), normal


def _unit_cylinder(o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    radius = 0.8
    a = d[:, 0] ** 2 + d[:, 2] ** 2
    b = o[:, 0] * d[:, 0] + o[:, 2] * d[:, 2]
    side = (-b - np.sqrt(b * b - a * (o[:, 0] ** 2 + o[:, 2] ** 2 - radius**2))) / a
    y = o[:, 1] + side * d[:, 1]
    side = np.where(np.abs(y) <= 1, side, np.nan)
    top = (1 - o[:, 1]) / d[:, 1]
    on_top = (o[:, 0] + top * d[:, 0]) ** 2 + (o[:, 2] + top * d[:, 2]) ** 2 <= radius**2
    top = np.where(on_top & (d[:, 1] < 0), top, np.nan)
    t = np.fmin(side, top)
    normal = o + t[:, None] * d
    normal[:, 1] = 0
    normal /= radius
    normal[t == top] = (0, 1, 0)
    return t, normal


def _unit_cone(o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Apex at y = 1, base of radius 1 at y = -1; the base lies on the ground and is never seen."""
    k = 0.25  # (radius / height)²
    h = 1 - o[:, 1]
    a = d[:, 0] ** 2 + d[:, 2] ** 2 - k * d[:, 1] ** 2
    b = o[:, 0] * d[:, 0] + o[:, 2] * d[:, 2] + k * h * d[:, 1]
    c = o[:, 0] ** 2 + o[:, 2] ** 2 - k * h**2
    root = np.sqrt(b * b - a * c)
    candidates = np.stack([(-b - root) / a, (-b + root) / a])
    y = o[:, 1] + candidates * d[:, 1]
    t = np.fmin.reduce(np.where((np.abs(y) <= 1) & (candidates > 0), candidates, np.nan))
    p = o + t[:, None] * d
    normal = np.stack([p[:, 0], k * (1 - p[:, 1]), p[:, 2]], -1)
    return t, normal / np.sqrt((normal * normal).sum(-1, keepdims=True) + 1e-12)


_UNIT_SOLIDS = {"sphere": _unit_sphere, "cube": _unit_cube, "cylinder": _unit_cylinder, "cone": _unit_cone}


def _sky_colour(scene: Scene, direction: np.ndarray, sun: np.ndarray) -> np.ndarray:
    """[R, 3]: a gradient, the sun low behind the objects at sunset, stars at night."""
    up = np.clip(direction[:, 1:2] * 3.2 + 0.05, 0, 1) ** 0.7
    horizon, zenith = (np.asarray(c, np.float32) for c in (scene.sky.horizon, scene.sky.zenith))
    colour = horizon + (zenith - horizon) * up
    disc = _normalize(np.array([-sun[0], 0.11, 2.2], np.float32))
    close = direction @ disc
    match scene.sky.phrase:
        case "at sunset":
            glow = np.clip((close - 0.93) / 0.07, 0, 1)[:, None] ** 3
            colour = colour + glow * np.array([0.5, 0.4, 0.1], np.float32)
        case "at night":
            cell = np.floor(direction[:, :2] * 38)
            bright = np.sin(cell @ np.array([127.1, 311.7], np.float32) + scene.azimuth) * 43758.5
            bright = bright - np.floor(bright)
            inside = np.abs(direction[:, :2] * 38 - cell - 0.5).max(-1) < 0.22
            colour = colour + (0.75 * ((bright > 0.9) & inside))[:, None].astype(np.float32)
    return colour


def _ground_colour(name: str, point: np.ndarray) -> np.ndarray:
    x, z = point[:, 0], point[:, 2]
    match name:
        case "sand":
            pattern = 0.05 * np.sin(5.0 * x + 2.5 * np.sin(0.9 * z)) * np.cos(1.6 * z)
        case "grass":
            pattern = 0.07 * np.sin(9.0 * x + 3.0 * z) * np.sin(7.0 * z - 4.0 * x) + 0.04 * np.sin(2.1 * x)
        case "snow":
            pattern = 0.025 * np.sin(1.3 * x + 0.7 * z) + 0.015 * np.sin(4.0 * z)
        case "tiles":
            pattern = np.where((np.floor(x / 1.1) + np.floor(z / 1.1)) % 2 > 0, 0.10, -0.14)
        case _:
            raise ValueError(f"unknown ground {name!r}")
    fade = np.clip(12 / (z - _EYE[2]) ** 1.3, 0, 1)  # far patterns are finer than a pixel
    return np.asarray(GROUNDS[name], np.float32) + (pattern * fade)[:, None].astype(np.float32)


def _shade(
    scene: Scene,
    point: np.ndarray,
    normal: np.ndarray,
    owner: np.ndarray,
    direction: np.ndarray,
    sun: np.ndarray,
) -> np.ndarray:
    """Lambert with one shadow ray, a highlight on the solids, and darkness where a solid meets the ground."""
    on_ground = owner < 0
    albedo = np.empty_like(point)
    albedo[on_ground] = _ground_colour(scene.ground, point[on_ground])
    for k, solid in enumerate(scene.solids):
        albedo[owner == k] = COLOURS[solid.colour]
    facing = np.clip(normal @ sun, 0, None)
    lit = facing > 0
    start = point[lit] + 2e-3 * normal[lit]
    shadow = _in_shadow(scene.solids, start, np.broadcast_to(sun, start.shape))
    facing[lit] = np.where(shadow, 0, facing[lit])
    contact = np.ones(len(point), np.float32)
    for solid in scene.solids:
        squared = (point[:, 0] - solid.x) ** 2 + (point[:, 2] - solid.z) ** 2
        contact = np.where(on_ground, contact - 0.45 * np.exp(-squared / (1.1 * solid.size) ** 2), contact)
    sky_seen = np.where(on_ground, np.clip(contact, 0.3, 1), 0.62 + 0.38 * normal[:, 1])
    ambient, light = (np.asarray(c, np.float32) for c in (scene.sky.ambient, scene.sky.light))
    colour = albedo * (ambient * sky_seen[:, None] + 0.78 * light * facing[:, None])
    halfway = _normalize(sun - direction)
    highlight = np.clip((normal * halfway).sum(-1), 0, 1) ** 40 * (facing > 0) * ~on_ground
    return (colour + 0.38 * light * highlight[:, None]).astype(np.float32)


def _in_shadow(solids: tuple[Solid, ...], origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    blocked = np.zeros(len(origin), bool)
    for solid in solids:
        near = _near(solid, origin, direction)
        blocked[near] |= _intersect(solid, origin[near], direction[near])[0] < _NEVER
    return blocked
