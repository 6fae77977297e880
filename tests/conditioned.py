"""Networks that are told a condition in place of a class, data sets of conditions, and the same of classes."""

import torch
from foreign_networks import UNet
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from soflow_fast.data import digits

CLASSES, WIDTH = 10, 16


class ByClass(UNet):
    """A network told the class, whose embedding is fixed."""

    def __init__(self):
        super().__init__(channels=1)
        table = torch.randn(CLASSES + 1, WIDTH, generator=torch.Generator().manual_seed(1))
        self.label = nn.Embedding.from_pretrained(table)


class ByEmbedding(ByClass):
    """The same network, told that embedding."""

    num_classes = None

    def __init__(self):
        super().__init__()
        self.register_buffer("null_condition", self.label.weight[CLASSES].clone())
        self.label = nn.Identity()


class ByTokens(ByClass):
    """Told two tokens, of which the second changes nothing."""

    num_classes = None

    def __init__(self):
        super().__init__()
        self.register_buffer("null_condition", torch.tensor([CLASSES, 0]))

    def forward(self, x, t, s, labels):
        return super().forward(x, t, s, labels[:, 0])


def conditions_of(labels, net):
    if isinstance(net, ByTokens):
        return torch.stack([labels, labels % 3], 1)
    return ByClass().label.weight.detach()[labels]


def data_of(net, n=32):
    images, labels = digits()[:n]
    return TensorDataset(images, conditions_of(labels, net))


class Items(Dataset):
    """Not held by the device: read by the loader, its caption drawn from two that are the same."""

    def __init__(self, n=32, kind="ByEmbedding"):
        self.pairs = data_of(globals()[kind](), n)

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, item):
        image, condition = self.pairs[item]
        return image, [condition, condition.clone()][int(torch.randint(2, ()))]


def seeded(make, *arguments, **keywords):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*arguments, **keywords)


class Learned(ByEmbedding):
    """With a null that is trained."""

    def __init__(self):
        super().__init__()
        null = self.null_condition
        del self.null_condition
        self.null_condition = nn.Parameter(null)


class Listed(ByEmbedding):
    """Told three numbers, which data sets yield in other forms than tensors too."""

    def __init__(self):
        super().__init__()
        self.null_condition, self.label = torch.zeros(3), nn.Linear(3, WIDTH)


class ByLabel(ByClass):
    """Told the class as if it were a condition."""

    num_classes = None

    def __init__(self):
        super().__init__()
        self.register_buffer("null_condition", torch.tensor(CLASSES))
