"""Models that are written here because their originals cannot be taken in: a detector like YOLOv8, a vocoder like VITS.

Both are written from their published descriptions, for what is unusual in them: channels split and handed on in parts,
pools chained and concatenated, boxes as distributions; weights as a direction times a length, gates from the two halves
of one convolution, and flows between which the channels are flipped.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class Convolution(nn.Sequential):
    """A convolution with its norm and SiLU."""

    def __init__(self, wide: int, out: int, kernel: int = 1, stride: int = 1) -> None:
        convolution = nn.Conv2d(wide, out, kernel, stride, kernel // 2, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(out), nn.SiLU())


class Residual(nn.Module):
    """Two convolutions, added to what goes in."""

    def __init__(self, width: int, shortcut: bool) -> None:
        super().__init__()
        self.first, self.second = Convolution(width, width, 3), Convolution(width, width, 3)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return x + y if self.shortcut else y


class SplitStage(nn.Module):
    """Channels in two halves, of which one goes through the residuals; all that came by is concatenated (C2f)."""

    def __init__(self, wide: int, out: int, count: int, shortcut: bool) -> None:
        super().__init__()
        self.half = out // 2
        self.first = Convolution(wide, 2 * self.half)
        self.last = Convolution((2 + count) * self.half, out)
        self.residuals = nn.ModuleList(Residual(self.half, shortcut) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for residual in self.residuals:
            parts.append(residual(parts[-1]))
        return self.last(torch.cat(parts, 1))


class PooledPyramid(nn.Module):
    """One pool after another, and all of them concatenated (SPPF)."""

    def __init__(self, wide: int, out: int, kernel: int = 5) -> None:
        super().__init__()
        self.first, self.last = Convolution(wide, wide // 2), Convolution(wide * 2, out)
        self.pool = nn.MaxPool2d(kernel, 1, kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        once = self.pool(x)
        twice = self.pool(once)
        return self.last(torch.cat([x, once, twice, self.pool(twice)], 1))


class BoxesAsDistributions(nn.Module):
    """The expected distance to each of the four sides, over bins that a fixed convolution numbers (DFL)."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins
        self.expectation = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.expectation.weight.data.copy_(torch.arange(bins, dtype=torch.float32).view(1, bins, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, _, anchors = x.shape
        logits = x.view(batch, 4, self.bins, anchors).transpose(2, 1)
        return self.expectation(logits.softmax(1)).view(batch, 4, anchors)


class Head(nn.Module):
    """For each of the scales a tower for boxes and one for classes; boxes in pixels come out, and scores."""

    def __init__(self, widths: tuple[int, ...], classes: int, bins: int = 16) -> None:
        super().__init__()
        boxes, scores = max(16, widths[0] // 4, bins * 4), max(widths[0], min(classes, 100))
        self.classes, self.bins = classes, bins
        self.boxes = nn.ModuleList(
            nn.Sequential(Convolution(w, boxes, 3), Convolution(boxes, boxes, 3), nn.Conv2d(boxes, 4 * bins, 1))
            for w in widths
        )
        self.scores = nn.ModuleList(
            nn.Sequential(Convolution(w, scores, 3), Convolution(scores, scores, 3), nn.Conv2d(scores, classes, 1))
            for w in widths
        )
        self.distances = BoxesAsDistributions(bins)

    def forward(self, maps: list[Tensor]) -> Tensor:
        found, centres, strides = [], [], []
        for level, (x, boxes, scores) in enumerate(zip(maps, self.boxes, self.scores, strict=True)):
            found.append(torch.cat([boxes(x), scores(x)], 1).flatten(2))
            rows, columns = x.shape[-2:]
            y, across = torch.meshgrid(
                torch.arange(rows, device=x.device, dtype=x.dtype) + 0.5,
                torch.arange(columns, device=x.device, dtype=x.dtype) + 0.5,
                indexing="ij",
            )
            centres.append(torch.stack([across, y]).flatten(1))
            strides.append(torch.full((1, rows * columns), 8.0 * 2**level, device=x.device, dtype=x.dtype))
        boxes, scores = torch.cat(found, 2).split((4 * self.bins, self.classes), 1)
        near, far = self.distances(boxes).chunk(2, 1)
        centre = torch.cat(centres, 1)
        corners = (centre - near, centre + far)
        box = torch.cat([(corners[0] + corners[1]) / 2, corners[1] - corners[0]], 1) * torch.cat(strides, 1)
        return torch.cat([box, scores.sigmoid()], 1)


class Detector(nn.Module):
    """A backbone, a pyramid down and up, and a head without anchors."""

    def __init__(self, width: int = 16, depth: int = 1, classes: int = 7) -> None:
        super().__init__()
        a, b, c, d = (width * 2**i for i in range(1, 5))
        self.stem = Convolution(3, width, 3, 2)
        self.stage2 = nn.Sequential(Convolution(width, a, 3, 2), SplitStage(a, a, depth, True))
        self.stage3 = nn.Sequential(Convolution(a, b, 3, 2), SplitStage(b, b, 2 * depth, True))
        self.stage4 = nn.Sequential(Convolution(b, c, 3, 2), SplitStage(c, c, 2 * depth, True))
        self.stage5 = nn.Sequential(Convolution(c, d, 3, 2), SplitStage(d, d, depth, True), PooledPyramid(d, d))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.down4, self.down3 = SplitStage(c + d, c, depth, False), SplitStage(b + c, b, depth, False)
        self.to4, self.up4 = Convolution(b, b, 3, 2), SplitStage(b + c, c, depth, False)
        self.to5, self.up5 = Convolution(c, c, 3, 2), SplitStage(c + d, d, depth, False)
        self.head = Head((b, c, d), classes)

    def forward(self, x: Tensor) -> Tensor:
        three = self.stage3(self.stage2(self.stem(x)))
        four = self.stage4(three)
        five = self.stage5(four)
        middle = self.down4(torch.cat([self.up(five), four], 1))
        fine = self.down3(torch.cat([self.up(middle), three], 1))
        middle = self.up4(torch.cat([self.to4(fine), middle], 1))
        return self.head([fine, middle, self.up5(torch.cat([self.to5(middle), five], 1))])


class Gated(nn.Module):
    """Dilated convolutions whose two halves are a tanh and its gate; half of what follows goes on, half comes out."""

    def __init__(self, width: int, layers: int, kernel: int = 5, conditions: int = 0) -> None:
        super().__init__()
        self.width = width
        self.inner, self.outer = nn.ModuleList(), nn.ModuleList()
        self.condition = weight_norm(nn.Conv1d(conditions, 2 * width * layers, 1)) if conditions else None
        for at in range(layers):
            self.inner.append(weight_norm(nn.Conv1d(width, 2 * width, kernel, padding=kernel // 2)))
            out = 2 * width if at < layers - 1 else width
            self.outer.append(weight_norm(nn.Conv1d(width, out, 1)))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        total = torch.zeros_like(x)
        conditions = self.condition(condition) if self.condition is not None and condition is not None else None
        for at, (inner, outer) in enumerate(zip(self.inner, self.outer, strict=True)):
            y = inner(x)
            if conditions is not None:
                y = y + conditions[:, 2 * self.width * at : 2 * self.width * (at + 1)]
            y = outer(torch.tanh(y[:, : self.width]) * torch.sigmoid(y[:, self.width :]))
            if at < len(self.inner) - 1:
                x = x + y[:, : self.width]
                total = total + y[:, self.width :]
            else:
                total = total + y
        return total


class Coupling(nn.Module):
    """Half of the channels shift the other half."""

    def __init__(self, channels: int, width: int, layers: int, conditions: int) -> None:
        super().__init__()
        self.half = channels // 2
        self.first = nn.Conv1d(self.half, width, 1)
        self.gated = Gated(width, layers, conditions=conditions)
        self.last = nn.Conv1d(width, self.half, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        kept, moved = x.split(self.half, 1)
        return torch.cat([kept, moved - self.last(self.gated(self.first(kept), condition))], 1)


class Upsampler(nn.Module):
    """Transposed convolutions, after each the mean of residual stacks with several kernels, to a waveform."""

    def __init__(
        self, wide: int, width: int, rates: tuple[int, ...] = (4, 4), kernels: tuple[int, ...] = (3, 5)
    ) -> None:
        super().__init__()
        self.first = weight_norm(nn.Conv1d(wide, width, 7, padding=3))
        self.up = nn.ModuleList(
            weight_norm(nn.ConvTranspose1d(width >> at, width >> (at + 1), 2 * rate, rate, rate // 2))
            for at, rate in enumerate(rates)
        )
        self.stacks = nn.ModuleList(
            nn.ModuleList(
                nn.ModuleList(
                    weight_norm(nn.Conv1d(width >> (at + 1), width >> (at + 1), k, dilation=d, padding=k // 2 * d))
                    for d in (1, 3)
                )
                for k in kernels
            )
            for at in range(len(rates))
        )
        self.last = weight_norm(nn.Conv1d(width >> len(rates), 1, 7, padding=3, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for up, stacks in zip(self.up, self.stacks, strict=True):
            x = up(nn.functional.leaky_relu(x, 0.1))
            found = []
            for stack in stacks:
                y = x
                for convolution in stack:
                    y = y + convolution(nn.functional.leaky_relu(y, 0.1))
                found.append(y)
            x = torch.stack(found).mean(0)
        return torch.tanh(self.last(nn.functional.leaky_relu(x)))


class Vocoder(nn.Module):
    """A spectrogram and its speaker to a waveform: flows, between which the channels are flipped, and an upsampler."""

    def __init__(self, mels: int = 20, channels: int = 16, width: int = 24, layers: int = 2, speakers: int = 5) -> None:
        super().__init__()
        self.speakers = nn.Embedding(speakers, width)
        self.project = nn.Conv1d(mels, channels, 1)
        self.flows = nn.ModuleList(Coupling(channels, width, layers, width) for _ in range(3))
        self.upsample = Upsampler(channels, 2 * width)

    def forward(self, spectrogram: Tensor, speaker: Tensor) -> Tensor:
        condition = self.speakers(speaker).unsqueeze(-1)
        x = self.project(spectrogram)
        for flow in self.flows:
            x = flow(x.flip(1), condition)
        return self.upsample(x)
