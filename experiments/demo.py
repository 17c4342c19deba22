"""The report of the demonstration: a picture, a chart and six sentences, for who has no data yet."""

from eval import SUCCESS_MM, is_last
from readers.points import LANDMARKS
from support.files import load_table, read_config, write_text

TITLE = "An attack on synthetic radiographs"


def publish(tested, attacked, letters, out):
    """Write <out>/report.md from what the experiments have written there, and print its sentences.

    Args:
        tested, attacked: lists of one results.Result, of the detector's test, and of the attacks compared.
        letters: list of results.Result, one of each letter.
    """
    (tested,), (attacked,) = tested, attacked
    sentences = [
        "The radiographs are synthetic: this project draws them, and no patient is shown.",
        describe_detection(tested),
        describe_attacks(attacked),
        describe_letters(letters, out),
        describe_differences(tested),
        f"A pilot, of {count_images(attacked)} and {len(letters)} images; the README has figures of real radiographs.",
    ]
    lines = "".join(f"{number}. {sentence}\n" for number, sentence in enumerate(sentences, 1))
    chart = f"attack_{attacked.folder.name}_within_4mm.png"
    write_text(
        out / "report.md",
        f"# {TITLE}\n\n{lines}\n![clean, attacked, perturbation](contact_sheet.png)\n\n"
        f"![landmarks in place against iterations]({chart})\n\nCommands, tables and further charts: "
        "[detection](detection.md), [attacks](attack.md), [letters](fancy.md).\n",
    )
    print("", *sentences, sep="\n")


def count_images(result):
    return result.predictions()["image"].nunique()


def describe_detection(tested):
    metrics = load_table(tested.folder / "summary.csv", ["landmark", "mre_mm"]).set_index("landmark").loc["all"]
    return (
        f"A detector, trained on other phantoms, finds {len(LANDMARKS)} landmarks on {count_images(tested)} of them "
        f"with a mean radial error of {metrics['mre_mm']:.2f} mm, {metrics['sdr_2mm_%']:.0f} % within 2 mm."
    )


def describe_attacks(attacked):
    config = read_config(attacked.folder / "config.json")
    table = load_table(attacked.folder / "summary.csv", ["role", "method", "iteration", "within_4mm_%"])
    shares = table[is_last(table)].set_index(["role", "method"])["within_4mm_%"]
    found = ", ".join(
        f"{method} brings {shares['targeted', method]:.0f} % to within {SUCCESS_MM} mm of their targets and leaves "
        f"{shares['stationary', method]:.0f} % of the others in place"
        for method in config["attack"]
    )
    return (
        f"Noise of at most {config['epsilon'] / 2:g} of 255 grey levels shall move {config['shift_count']} landmarks "
        f"of each image by {config['shift_mm']:g} mm and no other: {found}."
    )


def describe_letters(letters, out):
    table = load_table(out / "fancy.csv", ["method", "within 4 mm (%)", "to go (mm)"])
    word = "".join(result.labels["letter"] for result in letters)
    counts = ", ".join(f"{share * len(LANDMARKS) / 100:.0f}" for share in table["within 4 mm (%)"])
    return (
        f"With noise of the same strength {table['method'][0]} writes {word}: {counts} of the {len(LANDMARKS)} "
        f"landmarks come within {SUCCESS_MM} mm of their places, {table['to go (mm)'].mean():.0f} mm away in the mean."
    )


def describe_differences(tested):
    """What distinguishes the detector from the paper's."""
    training = read_config(tested.folder.parents[1] / "config.json")
    size, norm = "{} x {}".format(*training["size"]), " and batch norm in its encoder" * training["encoder_batch_norm"]
    return f"The detector has an input of {size} px{norm}, the paper's one of 800 x 640 px, and saw 80 images, not 150."
