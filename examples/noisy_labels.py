"""Find wrong labels by their losses: `python examples/noisy_labels.py`, then look at noisy_labels.png.

This is the idea of DivideMix and its relatives. Three of five labels of scikit-learn's handwritten digits are drawn at
random. A small network learns right labels before it learns wrong ones by heart. So after a few epochs the losses form two
groups, and a mixture of two Gaussians divides them. A new network then learns from the low group alone. If fewer labels
are wrong, or the training is shorter, this makes no difference, and all labels serve as well. Needs `pip install -e
.[examples]`.
"""

import argparse

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import trange

import paa_gpu


def load(noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels [N, 64], right labels [N], and labels [N] of which the share `noise` is drawn at random (perhaps the right one)."""
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    pixels = torch.from_numpy(digits.data).float()[order] / 16
    labels = torch.from_numpy(digits.target).long()[order]
    noisy = torch.where(torch.rand(len(labels)) < noise, torch.randint(10, labels.shape), labels)
    return pixels, labels, noisy


def train(pixels: Tensor, labels: Tensor, epochs: int, name: str) -> nn.Module:
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in trange(epochs, desc=name):
        for rows in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            cross_entropy(network(pixels[rows]), labels[rows]).backward()
            optimizer.step()
    return network


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, default=0.6, help="part of the labels that is drawn at random")
    parser.add_argument("--warm-up", type=int, default=10, help="epochs before the losses are divided")
    parser.add_argument("--epochs", type=int, default=100, help="epochs after that")
    parser.add_argument("--out", default="noisy_labels.png")
    options = parser.parse_args(argv)
    if not 0 < options.noise <= 1:
        parser.error(f"--noise must be above 0 and at most 1, got {options.noise}")
    torch.manual_seed(0)
    pixels, right, noisy = load(options.noise)
    test = slice(0, 400)  # these keep their right labels, and are not trained with
    rest = slice(400, None)

    network = train(pixels[rest], noisy[rest], options.warm_up, "warm-up")
    with torch.no_grad():
        losses = cross_entropy(network(pixels[rest]), noisy[rest], reduction="none")
    losses = (losses - losses.min()) / (losses.max() - losses.min())
    fit = paa_gpu.fit_gmm_1d(losses[None], init="kmeans", max_iter=10, tol=1e-2, reg_covar=5e-4)
    clean = fit.low_probability(losses[None])[0] > 0.5

    wrong = noisy[rest] != right[rest]
    figures = {
        "wrong labels found": float((~clean)[wrong].float().mean()),
        "right labels kept": float(clean[~wrong].float().mean()),
    }
    for name, rows in (("all labels", torch.ones_like(clean)), ("the low group", clean)):
        network = train(pixels[rest][rows], noisy[rest][rows], options.epochs, name)
        figures[f"accuracy after training with {name}"] = float((network(pixels[test]).argmax(1) == right[test]).float().mean())
    for name, figure in figures.items():
        print(f"{name}: {figure:.1%}")

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.hist([losses[~wrong], losses[wrong]], 60, stacked=True, color=["#0072B2", "#E69F00"], label=["right", "wrong"])
    axes.axvline(float(losses[clean].max()), color="black", linestyle="--", label="where the mixture divides")
    axes.set(xlabel="loss after the warm-up, scaled to 0 to 1", ylabel="samples")
    axes.legend()
    figure.savefig(options.out, dpi=120)
    return figures


if __name__ == "__main__":
    main()
