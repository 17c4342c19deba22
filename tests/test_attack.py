import itertools

import numpy as np
import pytest
import torch
from conftest import ROOT, SIZE0, spread
from torch import nn

from attack import (
    ATTACKS,
    BY_VOTES,
    ONE_STEP,
    adaptive_weights,
    ati_fgsm,
    choose_targets,
    evasive_vote_pgd,
    fgsm,
    generator,
    goal_maps,
    grey_model,
    i_fgsm,
    keep_best,
    landmarks_in_place,
    log_vote_share,
    make_goal,
    random_start,
    random_targets,
    shift_targets,
    untargeted_fgsm,
    vote_goal,
    vote_loss,
    vote_pgd,
)
from dataset import Cephalograms
from defences import confidence
from model import UNet, decode, encode, landmark_loss

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


def goal_of(model, image, part=slice(None), name="I-FGSM"):
    """The goals of both images or a part: landmark 1 of the first, 1 and 3 of the second are targeted."""
    if name == "untargeted-FGSM":  # these tests need a loss that is not at its minimum
        name = "I-FGSM"
    with torch.no_grad():
        targets = TARGETS.masked_fill(~TARGETED[..., None], torch.nan)
        return make_goal(name, model(image[part]), targets[part])


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
    goal = goal_of(small, image, name=name)
    options = {} if name in ONE_STEP else {"steps": 25}
    for iteration, adversarial, _ in ATTACKS[name](small, image, goal, epsilon, **options):
        assert (adversarial - image).abs().max() <= epsilon / 256 + 1e-6
        assert adversarial.abs().max() <= 1
        assert iteration > 0 or torch.equal(adversarial, image)
    used = 0.2 if name in BY_VOTES else 0.99  # of the ball; the best iterate may be the first one
    assert (adversarial - image).abs().max() > used * epsilon / 256
    assert iteration == (1 if name in ONE_STEP else 25)


@pytest.mark.parametrize("attack", [i_fgsm, ati_fgsm])
def test_attack_is_the_papers_loop(unet, image, attack):
    """Two iterations against the formulas written out for one image, landmark by landmark."""
    *_, (_, adversarial, maps) = attack(unet, image, goal_of(unet, image), epsilon=8, steps=2)
    e = 8 / 256
    for b in range(2):
        x, p = image[b : b + 1], torch.zeros_like(image[b : b + 1])
        own = goal_of(unet, image, slice(b, b + 1))
        current = x
        for _ in range(2):
            current = current.detach().requires_grad_()
            losses = landmark_loss(unet(current), own)[0]
            mean = sum(loss.item() for loss in losses) / K
            total = sum((loss.item() / mean if attack is ati_fgsm else 1) * loss for loss in losses)
            total.backward()
            p = (p + 0.05 * e * current.grad.sign()).clamp(-e, e)
            current = (x - p).clamp(-1, 1)
        assert torch.allclose(current[0], adversarial[b])
    with torch.no_grad():
        assert torch.allclose(maps, unet(adversarial))  # the maps are those of the images


def test_i_and_ati_fgsm_lower_what_they_minimise(small, image):
    goal = goal_of(small, image)
    for attack, measure in [
        (i_fgsm, lambda losses: losses.sum(-1)),
        (ati_fgsm, lambda losses: losses.square().sum(-1)),
    ]:
        course = [measure(landmark_loss(maps, goal)) for _, _, maps in attack(small, image, goal, 64, 40)]
        assert (course[-1] < 0.95 * course[0]).all()


def test_fgsm_steps_down_and_untargeted_fgsm_up(small, image):
    goal = goal_of(small, image)
    clean, down = (landmark_loss(maps, goal).sum(-1) for *_, maps in fgsm(small, image, goal, epsilon=1))
    _, up = (landmark_loss(maps, goal).sum(-1) for *_, maps in untargeted_fgsm(small, image, goal, epsilon=1))
    assert (down < clean).all() and (up > clean).all()


@pytest.mark.parametrize("name", ATTACKS)
def test_a_batch_is_its_images_one_by_one(unet, image, name):
    options = {} if name in ONE_STEP else {"steps": 2}
    *_, (_, together, _) = ATTACKS[name](unet, image, goal_of(unet, image, name=name), 8, **options)
    for b in range(2):
        own = goal_of(unet, image, slice(b, b + 1), name)
        *_, (_, alone, _) = ATTACKS[name](unet, image[b : b + 1], own, 8, **options)
        assert torch.allclose(alone[0], together[b])


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in BY_VOTES])
def test_grey_noise_follows_the_sum_of_the_channels_gradients(small, image, name):
    grey = image[:, :1]
    goal = goal_of(small, grey.expand(-1, 3, -1, -1))
    (_, clean, _), (_, attacked, maps) = itertools.islice(ATTACKS[name](grey_model(small), grey, goal), 2)
    assert attacked.shape == grey.shape and torch.equal(clean, grey)
    assert torch.allclose(maps, small(attacked.expand(-1, 3, -1, -1)))
    x = grey.expand(-1, 3, -1, -1).clone().requires_grad_()
    losses = landmark_loss(small(x), goal)
    weights = adaptive_weights(losses.detach()) if name == "ATI-FGSM" else torch.ones_like(losses)
    (gradient,) = torch.autograd.grad((weights * losses).sum(), x)
    length = (0.05 if "I-FGSM" in name else 1) * 8 / 256 * (-1 if name.startswith("untargeted") else 1)
    assert torch.allclose(attacked, (grey - length * gradient.sum(1, keepdim=True).sign()).clamp(-1, 1))


def test_results_carry_no_gradient_and_the_callers_mode_does_not_matter(small, image):
    goal = goal_of(small, image)
    *_, (_, adversarial, maps) = i_fgsm(small, image, goal, steps=2)
    assert not adversarial.requires_grad and not maps.requires_grad
    with torch.no_grad():
        *_, (_, again, _) = i_fgsm(small, image, goal, steps=2)
    assert torch.equal(adversarial, again)


def test_an_attack_moves_a_landmark_of_a_detector_that_can_be_moved():
    """A toy detector whose maps are the image's channels: the attack can and must reach its target."""
    size, gain = (40, 40), torch.tensor([4.0, 1.0, 1.0]).view(1, 3, 1, 1)

    def detector(image):
        return (gain * image)[:, :, None]

    there = encode(torch.tensor([[[8.0, 9.0]]]), size)
    image = torch.cat([there.heatmap * 2 - 1, spread(there)[0][:, :, 0]], dim=1)
    assert decode(detector(image)).tolist() == [[[8, 9]]]
    for name in ("I-FGSM", "ATI-FGSM", "Vote-PGD"):
        goal = make_goal(name, detector(image), torch.tensor([[[30.0, 25.0]]]))
        *_, (_, _, maps) = ATTACKS[name](detector, image, goal, epsilon=256, steps=50)
        assert (decode(maps) - torch.tensor([30.0, 25.0])).norm() <= 1
        *_, (_, _, maps) = ATTACKS[name](detector, image, goal, epsilon=4, steps=50)
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
        goal = vote_goal(maps, torch.tensor([[place]]), torch.tensor([[True]]))
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
    goal = vote_goal(maps, places, targeted)._replace(places=places)
    assert landmarks_in_place(maps, goal).item() == 4
    widths = torch.tensor([0.1, 0.3, 0.33] * 2)
    shares = log_vote_share(maps, goal, widths[None])[0]
    expected = -(torch.tensor([1, 1.35, 2.5, 0.1, 0.9, 1]) * widths / 0.33 * shares).sum()
    assert vote_loss(maps, goal).item() == pytest.approx(expected.item(), rel=1e-4)


def test_stationary_landmarks_keep_their_clean_predictions(small, image):
    clean = small(image)
    goal = make_goal("Vote-PGD", clean, TARGETS.masked_fill(~TARGETED[..., None], torch.nan))
    assert torch.equal(goal.places[TARGETED], TARGETS[TARGETED])
    assert torch.equal(goal.places[~TARGETED], decode(clean, subpixel=True)[~TARGETED])


def test_the_best_iterate_is_kept_by_what_the_decoder_finds():
    scores = torch.tensor([[1, 5], [3, 2], [3, 4], [0, 6]])
    iterates = [(i, torch.full((2, 1, 1, 1), i), torch.full((2, 3, 1, 1, 1), i)) for i in range(4)]
    kept = list(keep_best(iterates, lambda maps: scores[maps[0, 0, 0, 0, 0].item()]))
    assert [adversarial.flatten().tolist() for _, adversarial, _ in kept] == [[0, 0], [1, 0], [2, 0], [2, 3]]
    assert [maps[:, 0].flatten().tolist() for *_, maps in kept] == [[0, 0], [1, 0], [2, 0], [2, 3]]


def test_restarts_are_never_worse(small, image):
    goal = goal_of(small, image, name="Vote-PGD")
    runs = [list(vote_pgd(small, image, goal, 16, steps=5, restarts=n)) for n in (1, 3)]
    assert [iteration for iteration, *_ in runs[1]] == list(range(16))
    for one, three in zip(runs[0], runs[1], strict=False):
        assert torch.equal(one[1], three[1])  # the first restart is the run without
    scores = [landmarks_in_place(maps, goal) for _, _, maps in runs[1]]
    assert all((later >= earlier).all() for earlier, later in itertools.pairwise(scores))


def test_the_evasive_attack_leaves_more_confident_maps(small, image, monkeypatch):
    monkeypatch.setattr("attack.landmarks_in_place", lambda maps, goal: torch.zeros(len(maps)))  # the last iterate
    goal = goal_of(small, image, name="Vote-PGD")
    nearest, scores = torch.full((2, K), 0.1).double(), []
    for attack in (vote_pgd, evasive_vote_pgd):
        *_, (_, _, maps) = attack(small, image, goal, 16, steps=20)
        peak, _ = confidence(maps, decode(maps))
        scores.append([peak.log().mean(), log_vote_share(maps, goal, nearest).mean()])
    assert (torch.tensor(scores[1]) > torch.tensor(scores[0])).all()


def test_a_restart_that_ends_as_well_is_not_taken(small, image, monkeypatch):
    monkeypatch.setattr("attack.landmarks_in_place", lambda maps, goal: torch.zeros(len(maps)))
    goal = goal_of(small, image, name="Vote-PGD")
    one, two = (list(vote_pgd(small, image, goal, 16, steps=2, restarts=n))[-1][1] for n in (1, 2))
    assert torch.equal(one, two) and not torch.equal(one, image)


def test_random_starts_do_not_depend_on_the_batch():
    image = torch.zeros(3, 1, 8, 8)
    starts = [random_start(batch, 8, torch.Generator().manual_seed(1)) for batch in (image, image[:1])]
    assert torch.equal(starts[0][2:], starts[1]) and 0.8 * 8 / 256 < starts[0].abs().max() <= 8 / 256


def test_a_detector_without_offsets_is_attacked_by_its_own_loss_and_decoder():
    """The example of docs/attacks.md, as it stands there: plain heatmaps, decoded by their maximum."""
    example = (ROOT / "docs" / "attacks.md").read_text().split("```python\n")[1].split("```")[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 7, padding=3), nn.ReLU(), nn.Conv2d(8, 2, 7, padding=3)
    model = nn.Sequential(*layers).requires_grad_(False)
    image, targets = torch.rand(1, 1, 32, 40) * 2 - 1, torch.tensor([[[5, 20], [33, 8]]])
    names = {"model": model, "image": image, "targets": targets}
    exec(example, names)
    found = names["decode_argmax"]
    assert torch.equal(found(names["heatmaps"]), targets) and not torch.equal(found(model(image)), targets)
    assert torch.equal(model(names["adversarial"]), names["heatmaps"])
    assert (names["adversarial"] - image).abs().max() <= 64 / 256 + 1e-6


# --- targets


def test_random_targets_follow_the_papers_protocol():
    counts, places = [], []
    for seed in range(2000):
        targets = random_targets(np.random.default_rng(seed), 19, (800, 640))
        chosen = ~np.isnan(targets).any(1)
        counts.append(chosen.sum())
        places.append(targets[chosen])
    places = np.concatenate(places)
    assert set(counts) == set(range(1, 18))  # |T| in 1 .. K - 2
    assert np.mean(counts) == pytest.approx(9, abs=0.4)
    assert places[:, 0].min() == pytest.approx(100, abs=0.3) and places[:, 0].max() == pytest.approx(600, abs=0.3)
    assert places[:, 1].min() == pytest.approx(250, abs=0.3) and places[:, 1].max() == pytest.approx(750, abs=0.3)


def test_shifts_are_as_long_as_asked_and_inside():
    landmarks = np.array([[0.0, 0.0], [239.0, 299.0], [120.0, 150.0]])
    for seed in range(50):
        targets = shift_targets(np.random.default_rng(seed), landmarks, SIZE0, count=2, displacement=80)
        chosen = ~np.isnan(targets).any(1)
        assert chosen.sum() == 2
        assert np.linalg.norm(targets[chosen] - landmarks[chosen], axis=1) == pytest.approx([80, 80])
        assert (targets[chosen] >= 0).all() and (targets[chosen] <= (239, 299)).all()


def test_targets_depend_on_seed_and_image_alone(official):
    few = Cephalograms(official, "test1", (50, 40), limit=2)
    many = Cephalograms(official, "test", (100, 80))
    for kind in ("random", "shift"):
        one = choose_targets(kind, few, 3, 5, 4.0)
        assert torch.equal(one.nan_to_num(-1), choose_targets(kind, many, 3, 5, 4.0)[:2].nan_to_num(-1))
        assert not torch.equal(one.nan_to_num(-1), choose_targets(kind, few, 4, 5, 4.0).nan_to_num(-1))
        assert not torch.equal(one[0].nan_to_num(-1), one[1].nan_to_num(-1))
    assert generator(0, "151").random() != generator(0, "152").random()


def test_targets_from_a_file(official, tmp_path):
    (tmp_path / "targets.csv").write_text("landmark,x,y\n19,10,20.5\n2,0,299\n")
    data = Cephalograms(official, "test1", (50, 40))
    targets = choose_targets(tmp_path / "targets.csv", data, 0, 5, 8.0)
    assert targets.shape == (3, 19, 2)
    assert targets[2, 18].tolist() == [10, 20.5] and targets[0, 1].tolist() == [0, 299]
    assert targets.isnan().any(-1).sum(-1).tolist() == [17] * 3
