import itertools
import re
from functools import partial

import pytest
import torch
from conftest import spread
from steps import NAMES, make_step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from attack import (
    ATTACKS,
    Attack,
    adaptive_weights,
    aim_at,
    apgd,
    apgd_checks,
    evasive_loss,
    grey_detector,
    keep_best,
    landmarks_in_place,
    last,
    negative,
    random_perturbations,
    run,
    square_search,
    vote_loss,
)
from detectors import goal_maps, log_vote_share, voting, voting_goal
from model import UNet, confidence, decode, encode, landmark_loss

K = 4


TARGETS = torch.tensor([[[5.0, 30], [0, 0], [0, 0], [0, 0]], [[20, 10], [0, 0], [8, 8], [0, 0]]]).double()
TARGETED = torch.tensor([[True, False, False, False], [True, False, True, False]])

# float64: no gradient's sign depends on the order of a sum


@pytest.fixture(scope="module")
def image():
    """Two images, some values at the ends of the range."""
    torch.manual_seed(2)
    return (torch.rand(2, 3, 40, 32, dtype=torch.float64) * 2.4 - 1.2).clamp(-1, 1)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(1)
    return UNet(K).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def small():
    """A detector of two layers, for what needs many iterations."""
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 16, 7, padding=3), nn.ReLU(), nn.Conv2d(16, 3 * K, 7, padding=3), nn.Unflatten(1, (3, K))
    return nn.Sequential(*layers).double().requires_grad_(False)


ITERATED = [name for name, attack in ATTACKS.items() if attack.steps is None]
SINGLY = [name for name, attack in ATTACKS.items() if not attack.universal]  # made for each image by itself


def attacked(name, model, image, part=slice(None), **options):
    """An attack on both images or a part; landmark 1 of the first, 1 and 3 of the second are targeted."""
    attack = ATTACKS[name] if isinstance(name, str) else name
    return run(attack, model, image[part], TARGETS[part], TARGETED[part], **options)


def goal_of(model, image, part=slice(None)):
    """The paper's goal maps of the same targets."""
    with torch.no_grad():
        return goal_maps(model(image[part]), TARGETS[part], TARGETED[part])


def test_adaptive_weights_by_hand():
    weights = adaptive_weights(torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]]))
    assert torch.allclose(weights, torch.tensor([[0.5, 1.0, 1.5], [3.0, 0.0, 0.0]]))


def test_goal_has_the_targets_and_else_the_clean_maps(small, image):
    clean = small(image)
    clean[:, 0, :, 3, 3] = 2.0  # a landmark there for the clean network
    targets = torch.full((2, K, 2), 16.0, dtype=torch.float64)
    targeted = torch.tensor([[True] + [False] * (K - 1)] * 2)
    goal = goal_maps(clean, targets, targeted)
    wanted = encode(targets, (40, 32))
    (offset, mask), (wanted_offset, wanted_mask) = spread(goal), spread(wanted)
    assert torch.equal(mask[:, 0], wanted_mask[:, 0])  # nothing of the old place is left
    assert torch.equal(goal.heatmap[:, 0], wanted.heatmap[:, 0])
    assert torch.allclose(offset[:, :, 0], wanted_offset[:, :, 0])
    assert torch.equal(goal.heatmap[:, 1:], clean[:, 0, 1:].sigmoid())
    assert torch.equal(mask[:, 1:], clean[:, 0, 1:] > 0) and mask[:, 1:, 3, 3].all()
    assert torch.equal(offset[:, :, 1:], clean[:, 1:, 1:] * mask[:, None, 1:])
    assert torch.allclose(goal.weight.sum(-1), torch.ones(2, K))


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("epsilon", [2, 64])
def test_noise_stays_in_the_ball_and_the_image_in_its_range(small, image, name, epsilon):
    for iteration, adversarial, maps in attacked(name, small, image, epsilon=epsilon, steps=25):
        assert (adversarial - image).abs().max() <= epsilon / 256 + 1e-6
        assert adversarial.abs().max() <= 1
        assert iteration > 0 or torch.equal(adversarial, image)
        assert maps.shape == (2, 3, K, 40, 32)
    used = 0.2 if ATTACKS[name].score else 0.99  # of the ball; the best iterate may be the first one
    assert (adversarial - image).abs().max() > used * epsilon / 256
    assert iteration == (25 if name in ITERATED else 1)


@pytest.mark.parametrize("name", ["I-FGSM", "ATI-FGSM"])
def test_attack_is_the_papers_loop(unet, image, name):
    """Two iterations against the formulas written out for one image, landmark by landmark."""
    _, adversarial, maps = last(attacked(name, unet, image, epsilon=8, steps=2))
    e = 8 / 256
    for b in range(2):
        x, p = image[b : b + 1], torch.zeros_like(image[b : b + 1])
        own = goal_of(unet, image, slice(b, b + 1))
        current = x
        for _ in range(2):
            current = current.detach().requires_grad_()
            losses = landmark_loss(unet(current), own)[0]
            mean = sum(loss.item() for loss in losses) / K
            total = sum((loss.item() / mean if name == "ATI-FGSM" else 1) * loss for loss in losses)
            total.backward()
            p = (p + 0.05 * e * current.grad.sign()).clamp(-e, e)
            current = (x - p).clamp(-1, 1)
        assert torch.allclose(current[0], adversarial[b])
    with torch.no_grad():
        assert torch.allclose(maps, unet(adversarial))  # the maps are those of the images


def test_i_and_ati_fgsm_lower_what_they_minimise(small, image):
    goal = goal_of(small, image)
    for name, figure in [
        ("I-FGSM", lambda losses: losses.sum(-1)),
        ("ATI-FGSM", lambda losses: losses.square().sum(-1)),
    ]:
        course = [figure(landmark_loss(maps, goal)) for *_, maps in attacked(name, small, image, epsilon=64, steps=40)]
        assert (course[-1] < 0.95 * course[0]).all()


def test_fgsm_steps_down_and_untargeted_fgsm_up(small, image):
    goal, away = goal_of(small, image), encode(decode(small(image)), (40, 32))
    clean, down = (landmark_loss(maps, goal).sum(-1) for *_, maps in attacked("FGSM", small, image, epsilon=1))
    assert (down < clean).all()
    clean, up = (landmark_loss(maps, away).sum(-1) for *_, maps in attacked("untargeted-FGSM", small, image, epsilon=1))
    assert (up > clean).all()


@pytest.mark.parametrize("name", SINGLY)
def test_a_batch_is_its_images_one_by_one(unet, image, name):
    _, together, _ = last(attacked(name, unet, image, steps=2))
    for b in range(2):
        _, alone, _ = last(attacked(name, unet, image, slice(b, b + 1), steps=2))
        assert torch.allclose(alone[0], together[b])


def test_a_universal_perturbation_is_one_for_all_images(small, image):
    image = 0.9 * image  # no value is clipped
    _, adversarial, _ = last(attacked("universal-Vote-PGD", small, image, steps=3))
    delta = adversarial - image
    assert torch.allclose(delta[0], delta[1]) and delta.abs().max() > 0.2 * 8 / 256
    known = ATTACKS["universal-Vote-PGD"]._replace(delta=delta[:1])
    (_, first, _), (iteration, again, maps) = attacked(known, small, image, steps=3)
    assert torch.equal(first, image) and torch.allclose(again, adversarial) and iteration == 3
    assert torch.allclose(maps, small(adversarial))


@pytest.mark.parametrize("name", ["I-FGSM", "ATI-FGSM", "FGSM"])
def test_grey_noise_follows_the_sum_of_the_channels_gradients(small, image, name):
    one = image[:, :1]
    goal = goal_of(small, one.expand(-1, 3, -1, -1))
    (_, clean, _), (_, found, maps) = itertools.islice(attacked(name, grey_detector(voting(small)), one), 2)
    assert found.shape == one.shape and torch.equal(clean, one)
    assert torch.allclose(maps, small(found.expand(-1, 3, -1, -1)))
    x = one.expand(-1, 3, -1, -1).clone().requires_grad_()
    losses = landmark_loss(small(x), goal)
    weights = adaptive_weights(losses.detach()) if name == "ATI-FGSM" else torch.ones_like(losses)
    (gradient,) = torch.autograd.grad((weights * losses).sum(), x)
    length = (0.05 if "I-FGSM" in name else 1) * 8 / 256
    assert torch.allclose(found, (one - length * gradient.sum(1, keepdim=True).sign()).clamp(-1, 1))


def test_results_carry_no_gradient_and_the_callers_mode_does_not_matter(small, image):
    for name in ATTACKS:
        _, adversarial, maps = last(attacked(name, small, image, steps=2))
        assert not adversarial.requires_grad and not maps.requires_grad
        with torch.no_grad():
            _, again, _ = last(attacked(name, small, image, steps=2))
        assert torch.equal(adversarial, again)


MAPS = torch.zeros(2, 3, K, 40, 32)
FAR = TARGETS.masked_fill(TARGETS == 30, 400)  # px0, say
REFUSED = {  # what is given instead, to whom; the message
    "another B": ("run", {"targets": TARGETS[:1]}, "targets must be (B, K, 2), .* targeted is torch.bool (2, 4)"),
    "another K": ("run", {"targeted": TARGETED[:, :2]}, "targets must be (B, K, 2)"),
    "no K": (
        "run",
        {"targets": TARGETS[:, 0], "targeted": TARGETED[:, 0]},
        "targeted must be (B, K), .* torch.bool (2,)",
    ),
    "a mask of numbers": ("run goal", {"targeted": TARGETED.long()}, "targeted must be (B, K), a tensor of kind bool"),
    "a mask of 0 and 1": (
        "run goal",
        {"targeted": TARGETED.double()},
        "targeted must be (B, K), a tensor of kind bool",
    ),
    "a list": ("run goal", {"targeted": TARGETED.tolist()}, "targeted is a list"),
    "numpy": ("run goal", {"targets": TARGETS.numpy()}, "targets is a ndarray"),
    "whole numbers": ("goal", {"targets": TARGETS.long()}, "targets must be (B, K, 2), a tensor of kind float"),
    "px0": ("run goal", {"targets": FAR}, "targets lie outside the input of 32 x 40 px: [5.0, 400.0], landmark 1"),
    "y, x": (
        "run goal",
        {"targets": TARGETS.flip(-1) + 5},
        "targets lie outside the input of 32 x 40 px: [35.0, 10.0]",
    ),
    "nan": ("run goal", {"targets": TARGETS.masked_fill(TARGETS == 30, torch.nan)}, "outside the input .* [5.0, nan]"),
    "infinite": ("run goal", {"targets": TARGETS.masked_fill(TARGETS == 30, torch.inf)}, "outside the input"),
    "nothing": (
        "run goal",
        {"targeted": TARGETED & False},
        "targeted must have a landmark of each image: it has [0, 0]",
    ),
    "one without": ("run goal", {"targeted": TARGETED & torch.tensor([[True], [False]])}, "it has [1, 0]"),
    "0 .. 255": ("run", {"image": 255 * torch.rand(2, 3, 40, 32)}, "image must lie in [-1, 1]: its values are 0"),
    "a nan in the image": ("run", {"image": MAPS[:, :, 0] * torch.nan}, "image must lie in [-1, 1]"),
    "bytes": ("run", {"image": MAPS[:, :, 0].byte()}, "image must be (B, C, H, W), a tensor of kind float"),
    "one image": ("run", {"image": MAPS[0, :, 0]}, "image must be (B, C, H, W), .* torch.float32 (3, 40, 32)"),
    "numpy image": ("run", {"image": MAPS[:, :, 0].numpy()}, "image is a ndarray"),
    "negative": ("run", {"epsilon": -8}, "epsilon must be a number from 0, .* -8, 2"),
    "no number": ("run", {"epsilon": float("nan")}, "epsilon must be a number from 0"),
    "no step": ("run", {"steps": 0}, "steps whole and above 0: they are 8, 0"),
    "half a step": ("run", {"steps": 2.5}, "steps whole and above 0"),
    "heatmaps only": (
        "run goal",
        {"maps": MAPS[:, 0]},
        "maps must be (B, 3, K, H, W), .* torch.float32 (2, 4, 40, 32)",
    ),
    "K before 3": ("run goal", {"maps": MAPS.transpose(1, 2)}, "maps must be (B, 3, K, H, W)"),
    "other landmarks": ("run goal", {"maps": MAPS[:, :, 1:]}, "targeted must be (B, K)"),
    "dict": ("run", {"maps": {"maps": MAPS}}, "the network must return one tensor: .* it returns a dict"),
    "list of dict": ("run", {"maps": [{"maps": MAPS}]}, "it returns a list"),
    "tuple": ("run", {"maps": (MAPS, MAPS)}, "it returns a tuple"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("name", SINGLY)
def test_what_does_not_fit_is_refused_at_the_door(small, image, name, case):
    """By every function that takes it: of the argument's name, what it is and what it should be."""
    whom, wrong, message = REFUSED[case]
    pattern = re.escape(message).replace(re.escape(".*"), ".*")
    given = {"image": image, "targets": TARGETS, "targeted": TARGETED, "epsilon": 8, "steps": 2} | wrong
    maps, attack = given.pop("maps", None), ATTACKS[name]
    model = small if maps is None else lambda _: maps
    values = {"px0", "y, x", "nan", "infinite", "nothing", "one without"}
    if "run" in whom and (attack.targeted or case not in values):
        with pytest.raises(ValueError, match=pattern):
            run(attack, model, **given)
    if "goal" in whom:
        with pytest.raises(ValueError, match=pattern):
            goal_maps(MAPS if maps is None else maps, given["targets"], given["targeted"])


@pytest.mark.parametrize("maps", [MAPS[:, 0], {"maps": MAPS}, MAPS.transpose(1, 2), MAPS.long(), MAPS.numpy()])
def test_what_is_decoded_is_maps(maps):
    with pytest.raises(ValueError, match=r"maps must be \(B, 3, K, H, W\)"):
        decode(maps)


def test_targets_at_the_edges_are_inside(small, image):
    """The edges lie half a pixel beyond the centres of pixels; what is not targeted may be anything."""
    targets = torch.full((2, K, 2), torch.nan)
    targets[:, 0], targets[:, 1] = torch.tensor([-0.5, -0.5]), torch.tensor([31.5, 39.5])
    targeted = ~targets.isnan().any(-1)
    for name in SINGLY:
        assert last(run(ATTACKS[name], small, image, targets, targeted, steps=1))[1].isfinite().all()


def test_an_untargeted_attack_needs_no_targets(small, image):
    none = torch.zeros(2, K, dtype=torch.bool)
    _, adversarial, _ = last(run(ATTACKS["untargeted-FGSM"], small, image, TARGETS * torch.nan, none))
    assert (adversarial - image).abs().max() > 0.9 * 8 / 256


def test_a_new_attack_is_a_row(small, image):
    """The squared paper's loss: a loss and a row, for every image and by the same function."""
    squared = Attack("squared", lambda outputs, aim: aim.losses(outputs).square().sum(-1))
    ends = [last(attacked(row, small, image, steps=3))[1] for row in ("I-FGSM", squared, squared)]
    assert torch.equal(ends[1], ends[2]) and not torch.equal(ends[0], ends[1])


def test_an_attack_moves_a_landmark_of_a_detector_that_can_be_moved():
    """A toy detector whose maps are the image's channels: the attack can and must reach its target."""
    size, gain = (40, 40), torch.tensor([4.0, 1.0, 1.0]).view(1, 3, 1, 1)

    def detector(image):
        return (gain * image)[:, :, None]

    there = encode(torch.tensor([[[8.0, 9.0]]]), size)
    image = torch.cat([there.heatmap * 2 - 1, spread(there)[0][:, :, 0]], dim=1)
    assert decode(detector(image)).tolist() == [[[8, 9]]]
    for name in ("I-FGSM", "ATI-FGSM", "Vote-PGD"):
        targets, targeted = torch.tensor([[[30.0, 25.0]]]), torch.tensor([[True]])
        _, _, maps = last(run(ATTACKS[name], detector, image, targets, targeted, epsilon=256, steps=50))
        assert (decode(maps) - targets).norm() <= 1
        _, _, maps = last(run(ATTACKS[name], detector, image, targets, targeted, epsilon=4, steps=50))
        assert decode(maps).tolist() == [[[8, 9]]]  # the budget is too small


# --- Vote-PGD


def test_vote_share_by_hand():
    """32 x 32: R = 1, so three pixels vote, and the disc of a place is its own pixel."""
    maps = torch.full((1, 3, 1, 32, 32), -9.0)
    maps[:, 1:] = 0
    for x, y, logit in [(4, 5, 2.0), (9, 9, 1.0), (20, 20, 0.0)]:
        maps[0, 0, 0, y, x] = logit
    voters = torch.tensor([2.0, 1.0, 0.0]).sigmoid()  # of logit minus the voters' lowest, 0
    for place, distances in [((4.0, 5.0), (0, 41**0.5, 481**0.5)), ((10.0, 9.0), (52**0.5, 1, 221**0.5))]:
        goal = voting_goal(maps, torch.tensor([[place]]), torch.tensor([[True]]))
        near = 1 / (1 + (torch.tensor(distances) / 0.5) ** 2)
        other = 0 if place == (4, 5) else torch.tensor(-9.0).sigmoid()  # the pixel at the place is no voter yet
        expected = ((voters * near).sum() + other) / (voters.sum() + other)
        found = log_vote_share(maps, goal, torch.tensor([[0.5]]))
        assert found.item() == pytest.approx(expected.log().item(), rel=1e-5)


def test_vote_weights_and_widths_follow_the_distance():
    """Weights by role, in units of the tolerance R / 3, widths in units of R: in place, at the edge, far away."""
    maps = torch.zeros(1, 3, 6, 100, 96)  # R = 5
    maps[:, 0, :, 50, 48] = 9.0
    places = torch.tensor([[[48 + d, 50] for d in (0, 1.5, 40)] * 2]).float()
    targeted = torch.tensor([[True] * 3 + [False] * 3])
    detector = voting(lambda image: maps)
    aim = aim_at(detector, torch.zeros(1, 3, 100, 96), places, targeted)
    aim = aim._replace(places=places, goal=voting_goal(maps, places, targeted))
    assert landmarks_in_place(maps, aim).item() == 4
    widths = torch.tensor([0.1, 0.3, 0.33] * 2)
    shares = log_vote_share(maps, aim.goal, widths[None])[0]
    expected = -(torch.tensor([1, 1.35, 2.5, 0.1, 0.9, 1]) * widths / 0.33 * shares).sum()
    assert vote_loss(maps, aim).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("subpixel", [False, True])
def test_stationary_landmarks_keep_their_clean_predictions(small, image, subpixel):
    aim = aim_at(voting(small, subpixel), image, TARGETS, TARGETED)
    assert torch.equal(aim.places[TARGETED], TARGETS[TARGETED])
    assert torch.equal(aim.places[~TARGETED], decode(small(image), subpixel)[~TARGETED].double())
    assert torch.equal(aim.goal.places, aim.places)


def test_the_best_iterate_is_kept_by_what_the_decoder_finds():
    scores = torch.tensor([[1, 5], [3, 2], [3, 4], [0, 6]])
    iterates = [(i, torch.full((2, 1, 1, 1), i), torch.full((2, 3, 1, 1, 1), i)) for i in range(4)]
    kept = list(keep_best(iterates, lambda maps: scores[maps[0, 0, 0, 0, 0].item()]))
    assert [adversarial.flatten().tolist() for _, adversarial, _ in kept] == [[0, 0], [1, 0], [2, 0], [2, 3]]
    assert [maps[:, 0].flatten().tolist() for *_, maps in kept] == [[0, 0], [1, 0], [2, 0], [2, 3]]


def test_the_kept_iterate_is_never_worse_than_the_one_before(small, image):
    aim = aim_at(voting(small), image, TARGETS, TARGETED)
    scores = [landmarks_in_place(maps, aim) for *_, maps in attacked("Vote-PGD", small, image, epsilon=16, steps=10)]
    assert all((later >= earlier).all() for earlier, later in itertools.pairwise(scores))


def test_the_iterate_that_counts_can_be_chosen(small, image):
    """Of Vote-PGD and of I-FGSM: the last iterates are those of the row without a score, the best never get worse."""
    aim = aim_at(voting(small), image, TARGETS, TARGETED)
    for name in ("Vote-PGD", "I-FGSM"):
        runs = {kind: ATTACKS[name].counting(kind) for kind in ("last", "best")}
        found = {kind: list(attacked(row, small, image, epsilon=16, steps=10)) for kind, row in runs.items()}
        in_place = {kind: torch.stack([landmarks_in_place(maps, aim) for *_, maps in found[kind]]) for kind in runs}
        assert torch.equal(in_place["best"], in_place["last"].cummax(0).values)
        plain = last(attacked(ATTACKS[name]._replace(score=None), small, image, epsilon=16, steps=10))
        assert torch.equal(found["last"][-1][1], plain[1])


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if attack.loss and attack.targeted])
def test_a_free_landmark_counts_in_no_loss(small, image, name):
    free = torch.zeros_like(TARGETED)
    free[:, (~TARGETED).all(0).nonzero()[0]] = True
    aim = aim_at(voting(small), image, TARGETS, TARGETED, free=free)
    maps = (small(image) + torch.randn(small(image).shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    loss = ATTACKS[name].loss(maps, aim).sum()
    if loss.requires_grad:  # that of Square attack has no gradient
        gradient = torch.autograd.grad(loss, maps)[0].abs().sum((1, 3, 4))
        assert (gradient[free] == 0).all() and (gradient[TARGETED] > 0).all()
    changed = torch.where(free[:, None, :, None, None], -maps.detach(), maps.detach())
    assert torch.allclose(ATTACKS[name].loss(changed, aim), ATTACKS[name].loss(maps.detach(), aim))
    assert landmarks_in_place(changed, aim).equal(landmarks_in_place(maps.detach(), aim))


def test_the_evasive_attack_leaves_more_confident_maps(small, image):
    goal = aim_at(voting(small), image, TARGETS, TARGETED).goal
    nearest, scores = torch.full((2, K), 0.1).double(), []
    for loss in (vote_loss, evasive_loss):
        attack = ATTACKS["Vote-PGD"]._replace(loss=loss, score=None)  # the last iterate
        _, _, maps = last(attacked(attack, small, image, epsilon=16, steps=20))
        peak = confidence(maps, decode(maps))["heatmap_peak"]
        scores.append([peak.log().mean(), log_vote_share(maps, goal, nearest).mean()])
    assert (torch.tensor(scores[1]) > torch.tensor(scores[0])).all()


def test_the_parts_of_vote_pgd_are_options(small, image):
    """Each changes the attack: weights, widths, momentum, steps, what is kept."""
    attack, ends = ATTACKS["Vote-PGD"], []
    for changes in (
        {},
        {"loss": partial(vote_loss, targeted_weight=(1, 1, 0), stationary_weight=(0.3, 0.3, 0))},
        {"loss": partial(vote_loss, width=(0.33, 0.33))},
        {"options": attack.options | {"momentum": 0.0}},
        {"options": attack.options | {"step_size": 0.05}},
        {"score": None},
    ):
        row = attack._replace(**({"score": negative(vote_loss)} | changes))
        ends.append(last(attacked(row, small, image, epsilon=32, steps=4))[1])
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(ends[:-1], 2))


def test_apgd_checks_where_its_paper_says():
    assert sorted(apgd_checks(100))[:8] == [22, 41, 57, 70, 80, 87, 93, 99]


def test_apgd_halves_the_step_of_the_image_that_swings():
    """The loss of the first image falls at the edge of the ball, that of the second at a sixteenth of it."""
    image, bound = torch.zeros(2, 1, 1, 1), 64 / 256
    best = torch.tensor([-1.0, 1 / 16]).view(-1, 1, 1, 1) * bound
    iterates = list(apgd(lambda image: image, image, lambda x: (x - best).abs().flatten(), 64, 40))
    ends = torch.stack([adversarial.flatten() for _, adversarial, _ in iterates]) / bound
    assert (ends.abs() <= 1).all() and (ends[1:, 0] == -1).all()
    assert ends[1, 1] == 1 and (ends[-5:, 1] - 1 / 16).abs().max() < 0.1


def test_the_square_attack_keeps_what_lowers_the_loss():
    image, losses = torch.zeros(2, 3, 8, 8), []

    def loss(x):
        losses.append((x - torch.linspace(-1, 1, 64).view(8, 8)).square().mean((1, 2, 3)))
        return losses[-1]

    *_, (_, adversarial, _) = keep_best(square_search(lambda x: x, image, loss, 64, 200, 0), lambda x: -loss(x))
    assert loss(adversarial)[0] == torch.stack(losses).min(0).values[0] < 0.9 * losses[0][0]
    assert set(adversarial.abs().unique().tolist()) <= {0.0, 0.25}


def test_random_perturbations_do_not_depend_on_the_batch():
    image = torch.zeros(3, 1, 8, 8)
    (_, three), (_, one) = (
        [adversarial for _, adversarial, _ in random_perturbations(lambda image: image, batch, None, 8, 1, seed=1)]
        for batch in (image, image[:1])
    )
    assert torch.equal(three[2:], one) and 0.8 * 8 / 256 < one.abs().max() <= 8 / 256


class NoValues(TorchDispatchMode):
    """Refuses what would wait for a GPU: a tensor's value in Python, or a shape that depends on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not re.search("local_scalar|nonzero|masked_select|unique", str(function)), function
        return function(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_step_waits_for_no_value(name):
    step = make_step(name, "cpu", size=(32, 32))
    with NoValues():
        step()
