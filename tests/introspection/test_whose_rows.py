"""Whose rows are whose where NaN in the inputs does not tell: tokens, lengths, masks, and rows that no sample reaches.

No sample of these models sees another, so a group's share is the gradient of the loss of its own samples.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import autospec
from autospec.introspection import WatchError

N, T, WORDS = 5, 7, 9
LABELS = list("aabba")


def tokens(lengths, positions=T):
    words = torch.randint(1, WORDS, (len(lengths), positions))
    return words * (torch.arange(positions) < torch.tensor(lengths)[:, None])


def series(lengths):
    return torch.randn(len(lengths), T, 4)


def mask(lengths):
    """As many positions of each, anywhere."""
    marked = torch.zeros(len(lengths), T, dtype=torch.bool)
    for row, length in zip(marked, lengths, strict=True):
        row[torch.randperm(T)[:length]] = True
    return marked


def assert_shares_of_own_loss(model, batches, labels=LABELS, **options):
    """Compare what is recorded of each batch with gradients of the loss of each group's samples alone."""
    recorded = 0
    with autospec.watch(model, quiet=True, **{"groups": labels, **options}) as watcher:
        for step, batch in enumerate(batches):
            model.zero_grad()
            model(*batch).square().sum().backward()
            watcher.step()
            gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
            for group in sorted(set(labels)):
                model.zero_grad()
                model(*batch)[[label == group for label in labels]].square().sum().backward()
                for name, parameter in model.named_parameters():
                    node = f"layers/{name}/gradient"
                    if parameter.ndim < 2 or name not in gradients:
                        continue
                    own = torch.linalg.svdvals(parameter.grad.flatten(1).double()).numpy()
                    found = watcher.trajectories[node].sel(group=group).values[step, : len(own)]
                    assert np.abs(found - own).max() < 1e-5 * own[0], (step, group, name)
                    recorded += 1
    assert recorded


class Model(nn.Module):
    """A forward pass in a function, with the layers it needs."""

    def __init__(self, forward, **layers):
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *batch):
        return self._forward(self, *batch)


def table(**options):
    return nn.Embedding(WORDS, 4, **options)


def sorted_before(self, words, lengths):
    """Sequences are brought into the order of their lengths, then looked up."""
    lengths, order = lengths.sort(descending=True)
    packed = pack_padded_sequence(self.table(words[order]), lengths, batch_first=True)
    return self.head(self.recurrent(packed)[1][0][order.argsort()])


def sorted_by_rows(self, words, lengths):
    order = lengths.argsort()
    return self.head(self.layer(self.table(words[order])).tanh().mean(1))[order.argsort()]


def turned(self, words, _):
    return self.head(self.table(words.t())).transpose(0, 1)


def flattened(self, words, _):
    return self.head(self.table(words.reshape(-1)).view(len(words), -1))


def in_windows(self, words, _):
    windows = words[:, :6].reshape(-1, 3)
    return self.head(self.layer(self.table(windows)).tanh().flatten(1).view(len(words), -1))


def all_but_the_last(self, words, _):
    return self.head(self.layer(self.table(words[:, :-1])).tanh())


def two_in_one(self, words, lengths):
    """One lookup for two inputs, one after the other."""
    first, second = self.table(torch.cat([words, words.flip(1)])).chunk(2)
    return self.head((first - second).flatten(1))


def twice(self, words, lengths):
    """The order differs from one call to the next."""
    order = lengths.argsort()
    first, second = self.table(words), self.table(words[order])[order.argsort()]
    return self.head((first.tanh() + second).mean(1))


SIX_BY_FOUR, FOUR_BY_THREE = (lambda: nn.Linear(4, 6)), (lambda: nn.Linear(4, 3))
FOLLOWED = {
    "sorted before the lookup": lambda: Model(
        sorted_before, table=table(padding_idx=0), recurrent=nn.GRU(4, 6, batch_first=True), head=nn.Linear(6, 3)
    ),
    "frozen vectors": lambda: Model(
        sorted_before,
        table=nn.Embedding.from_pretrained(torch.randn(WORDS, 4)),
        recurrent=nn.GRU(4, 6, batch_first=True),
        head=nn.Linear(6, 3),
    ),
    "rows of every position": lambda: Model(sorted_by_rows, table=table(), layer=SIX_BY_FOUR(), head=nn.Linear(6, 3)),
    "time first": lambda: Model(turned, table=table(), head=FOUR_BY_THREE()),
    "flattened": lambda: Model(flattened, table=table(), head=nn.Linear(4 * T, 3)),
    "windows": lambda: Model(in_windows, table=table(), layer=SIX_BY_FOUR(), head=nn.Linear(36, 3)),
    "a part": lambda: Model(all_but_the_last, table=table(), layer=SIX_BY_FOUR(), head=nn.Linear(6, 3)),
    "two inputs in one lookup": lambda: Model(two_in_one, table=table(), head=nn.Linear(4 * T, 3)),
    "called twice": lambda: Model(twice, table=table(), head=FOUR_BY_THREE()),
}


@pytest.mark.parametrize("kind", FOLLOWED)
def test_tokens_are_followed_to_their_lookup_however_the_model_brings_them_there(kind):
    torch.manual_seed(0)
    lengths = [[3, 5, 2, 7, 4], [6, 1, 2, 3, 7]]
    assert_shares_of_own_loss(FOLLOWED[kind](), [(tokens(each), torch.tensor(each)) for each in lengths])


@pytest.mark.parametrize("layer", ["recurrent", "per token"])
def test_batch_dim_is_that_of_the_input_and_not_of_what_the_model_makes_of_it(layer):
    """As many positions as samples, turned round within the model."""

    def forward(self, words):
        looked_up = self.table(words.t())
        hidden = self.recurrent(looked_up)[0] if layer == "recurrent" else looked_up.tanh()
        return self.head(hidden).transpose(0, 1)

    torch.manual_seed(0)
    layers = {"recurrent": nn.GRU(4, 4)} if layer == "recurrent" else {}
    model = Model(forward, table=table(), head=FOUR_BY_THREE(), **layers)
    assert_shares_of_own_loss(model, [(tokens([5, 2, 3, 1, 5], N),)], batch_dim=0)


def test_codes_that_are_sorted_together_with_a_series_are_followed():
    def forward(self, x, site, lengths):
        lengths, order = lengths.sort(descending=True)
        first = self.site(site[order]).unsqueeze(0)
        return self.head(self.recurrent(pack_padded_sequence(x[order], lengths, True), first)[1][0])[order.argsort()]

    torch.manual_seed(0)
    model = Model(forward, site=nn.Embedding(6, 6), recurrent=nn.GRU(4, 6, batch_first=True), head=nn.Linear(6, 3))
    lengths = torch.tensor([3, 5, 2, 7, 4])
    assert_shares_of_own_loss(model, [(series(lengths), torch.tensor([3, 1, 2, 4, 4]), lengths)])


@pytest.mark.parametrize("converted", [False, True])
def test_codes_from_zero_on_are_followed(converted):
    def forward(self, x, site):
        order = x[:, 0].argsort()
        codes = site.long() if converted else site[order][order.argsort()]
        return self.head((self.site(codes) + self.layer(x)).tanh())

    torch.manual_seed(0)
    model = Model(forward, site=nn.Embedding(3, 6), layer=SIX_BY_FOUR(), head=nn.Linear(6, 3))
    site = torch.tensor([0, 2, 0, 1, 0], dtype=torch.int32)
    assert_shares_of_own_loss(model, [(torch.randn(N, 4), site)])


def test_a_sample_that_is_padding_alone_has_the_slice_that_is_left():
    torch.manual_seed(0)
    model = Model(sorted_by_rows, table=table(), layer=SIX_BY_FOUR(), head=nn.Linear(6, 3))
    assert_shares_of_own_loss(model, [(tokens([3, 0, 2, 7, 4]), torch.tensor([3, 0, 2, 7, 4]))])


def picked(self, x, marked):
    hidden = self.layer(x[marked]).tanh()
    return self.head(hidden.new_zeros(len(x), 6).index_add(0, marked.nonzero()[:, 0], hidden))


def trimmed(self, x, lengths):
    x = x[:, : int(lengths.max())]
    counts = (torch.arange(x.shape[1]) < lengths[:, None]).unsqueeze(-1)
    return self.head((self.layer(x).tanh() * counts).sum(1))


def padded_again(self, x, lengths):
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    hidden = pad_packed_sequence(self.recurrent(packed)[0], batch_first=True)[0]
    return self.head(hidden).sum(1)


def without_padding(self, words):
    there = words != 0
    hidden = self.layer(self.table(words)[there]).tanh()
    return self.head(hidden.new_zeros(len(words), 6).index_add(0, there.nonzero()[:, 0], hidden))


def packed_rows(self, words):
    lengths = (words != 0).sum(1)
    packed = pack_padded_sequence(self.table(words), lengths, True, enforce_sorted=False)
    packed = PackedSequence(self.layer(packed.data).tanh(), *packed[1:])
    return self.head(self.recurrent(packed)[1][0])


def sorted_where_needed(self, words, lengths):
    if not bool((lengths.diff() > 0).any()):
        return self.head(self.layer(self.table(words)).tanh().mean(1))
    order = lengths.argsort(descending=True)
    return self.head(self.layer(self.table(words[order])).tanh().mean(1))[order.argsort()]


def windows_by_the_longest(self, x, lengths):
    """As many rows, in another order."""
    windows = x[:, :6].unflatten(1, (-1, 2 if int(lengths.max()) > 5 else 3)).transpose(0, 1)
    return self.head(self.layer(windows).tanh().transpose(0, 1).flatten(1, 2).sum(1))


SIX = {"layer": SIX_BY_FOUR, "head": lambda: nn.Linear(6, 3)}
HIDDEN = {
    "a mask with as many of each": (picked, SIX, lambda n: (series(n), mask(n)), [[3] * N, [5, 4, 2, 1, 3]]),
    "a mask with more of one": (picked, SIX, lambda n: (series(n), mask(n)), [[3] * N, [5, 4, 2, 2, 3]]),
    "series cut to the longest": (
        trimmed,
        SIX,
        lambda n: (series(n), torch.tensor(n)),
        [[6, 5, 4, 3, 6], [2, 4, 3, 2, 1]],
    ),
    "padded to the longest": (
        padded_again,
        {"recurrent": lambda: nn.LSTM(4, 6, batch_first=True), "head": SIX["head"]},
        lambda n: (series(n), torch.tensor(n)),
        [[3, 5, 2, 5, 4], [1, 2, 6, 5, 4]],
    ),
    "no padding in the first batch": (
        without_padding,
        {"table": table, **SIX},
        lambda n: (tokens(n),),
        [[T] * N, [2, 4, 3, 2, 6]],
    ),
    "packed, as long in the first batch": (
        packed_rows,
        {
            "table": lambda: table(padding_idx=0),
            "layer": lambda: nn.Linear(4, 4),
            "recurrent": lambda: nn.GRU(4, 6, batch_first=True),
            "head": SIX["head"],
        },
        lambda n: (tokens(n),),
        [[4] * N, [2, 6, 5, 3, 4]],
    ),
    "sorted already": (
        sorted_where_needed,
        {"table": table, **SIX},
        lambda n: (tokens(n), torch.tensor(n)),
        [[T, 5, 4, 2, 1], [3, 5, 2, 4, 5]],
    ),
    "windows that go by the longest": (
        windows_by_the_longest,
        SIX,
        lambda n: (series(n), torch.tensor(n)),
        [[3, 6, 2, 4, 5], [3, 5, 2, 4, 5]],
    ),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_what_rows_go_by_is_found_although_the_first_batch_hides_it(kind):
    torch.manual_seed(0)
    forward, layers, batch, lengths = HIDDEN[kind]
    model = Model(forward, **{name: layer() for name, layer in layers.items()})
    assert_shares_of_own_loss(model, [batch(each) for each in lengths])


def test_batches_of_one_sample_whose_rows_go_by_a_mask():
    torch.manual_seed(0)
    model = Model(picked, **{name: layer() for name, layer in SIX.items()})
    with autospec.watch(model, ["a", "b"], quiet=True) as watcher:
        for length, label in ((3, "a"), (5, "b")):
            watcher.set_groups([label])
            model(series([length]), mask([length])).square().sum().backward()
            watcher.step()
    assert watcher.trajectories["layers/layer.weight"]["gradient"].sizes["step"] == 2


def test_rows_whose_number_goes_by_an_attribute_are_traced_anew_when_it_changes():
    """Longer and longer series, as a curriculum has them."""

    def forward(self, x):
        return self.head(self.layer(x[:, : self.length].transpose(0, 1)).tanh().sum(0))

    torch.manual_seed(0)
    model = Model(forward, **{name: layer() for name, layer in SIX.items()})
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        for model.length in (3, 6):
            x = series([T] * N)
            model.zero_grad()
            model(x).square().sum().backward()
            watcher.step()
    model.zero_grad()
    model(x)[[0, 1, 4]].square().sum().backward()
    own = torch.linalg.svdvals(model.layer.weight.grad.double()).numpy()
    found = watcher.trajectories["layers/layer.weight/gradient"].sel(group="a").values[1]
    assert np.abs(found - own).max() < 1e-5 * own[0]


def test_ordinary_tokens_masks_and_codes_are_traced_once(probes):
    def forward(self, words, kept, site):
        positions = self.places(torch.arange(words.shape[1]).unsqueeze(0))
        hidden = self.block(self.table(words) + positions, src_key_padding_mask=~kept.bool())
        return self.head((hidden * kept.unsqueeze(-1)).sum(1) + self.site(site))

    torch.manual_seed(0)
    model = Model(
        forward,
        table=table(padding_idx=0),
        places=nn.Embedding(T, 4),
        site=nn.Embedding(3, 4),
        block=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        head=FOUR_BY_THREE(),
    ).eval()
    batches = []
    for lengths in ([3, 5, 2, 7, 4], [T] * N, [1, 1, 2, 1, 1]):
        words = tokens(lengths)
        batches.append((words, (words != 0).long(), torch.randint(3, (N,))))
    assert_shares_of_own_loss(model, batches)
    assert len(probes) == 1


def test_a_token_by_which_a_model_sorts_is_not_followed_blindly():
    """Raised numbers would be sorted otherwise: the lookup is then read as it lies, and where rows disagree refused."""

    def forward(self, x, site):
        order = site.argsort()
        return self.head((self.site(site[order]) + self.layer(x[order])).tanh())[order.argsort()]

    torch.manual_seed(0)
    model = Model(forward, site=nn.Embedding(6, 6), layer=SIX_BY_FOUR(), head=nn.Linear(6, 3))
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        with pytest.raises(WatchError, match="mix several samples"):
            model(torch.randn(N, 4), torch.tensor([3, 1, 2, 4, 5]))
        watcher.discard()


def from_zeros(self, x):
    """A recurrent network written by hand, whose first state no sample reaches."""
    state = x.new_zeros(len(x), 6)
    for now in x.unbind(1):
        state = torch.tanh(self.layer(now) + self.state(state))
    return self.head(state)


def from_a_learned_state(self, x):
    state = self.first.expand(len(x), -1)
    for now in x.unbind(1):
        state = torch.tanh(self.layer(now) + self.state(state))
    return self.head(state)


def decoded(self, x):
    """A decoder that begins with a token of zeros and goes on with what it has made."""
    hidden, made, steps = torch.tanh(self.layer(x[:, 0])), x.new_zeros(len(x), 3), []
    for _ in range(3):
        made = self.head(torch.tanh(hidden + self.state(made)))
        steps.append(made)
    return torch.stack(steps, 1)


def one_hot(self, x, site):
    codes = nn.functional.one_hot(site, 3).to(x.dtype)
    return self.head(torch.tanh(self.layer(x[:, 0]) + self.state(codes)))


def time_of_diffusion(self, x, time):
    """The last that is computed: only what the model returns tells."""
    waves = torch.outer(time.to(x.dtype), torch.tensor([0.1, 0.2, 0.3, 0.4])).sin()
    return torch.tanh(self.layer(x[:, 0]) + self.state(waves))


def shifted_time_first(self, x):
    """The first position of each sample holds nothing, and rows lie time first, folded into one dimension."""
    x = torch.cat([x.new_zeros(len(x), 1, 4), x[:, :-1]], 1).transpose(0, 1)
    hidden = self.layer(x).tanh().cumsum(0)
    return self.head(hidden.flatten(0, 1)).unflatten(0, x.shape[:2]).transpose(0, 1)


UNREACHED = {
    "first state of zeros": (from_zeros, 6, lambda: ()),
    "learned first state": (from_a_learned_state, 6, lambda: ()),
    "first token of zeros": (decoded, 3, lambda: ()),
    "one-hot codes": (one_hot, 3, lambda: (torch.tensor([0, 2, 1, 1, 0]),)),
    "time of diffusion": (time_of_diffusion, 4, lambda: (torch.tensor([3, 50, 7, 7, 21]),)),
    "shifted, time first": (shifted_time_first, 6, lambda: ()),
}


@pytest.mark.parametrize("kind", UNREACHED)
def test_rows_that_no_sample_reaches_go_to_the_sample_that_they_reach(kind):
    torch.manual_seed(0)
    forward, width, more = UNREACHED[kind]
    model = Model(forward, layer=SIX_BY_FOUR(), state=nn.Linear(width, 6), head=nn.Linear(6, 3))
    if kind == "learned first state":
        model.first = nn.Parameter(torch.randn(6))
    if kind == "shifted, time first":
        del model.state
    if kind == "time of diffusion":
        del model.head
    assert_shares_of_own_loss(model, [(series([T] * N), *more())])


def test_rows_of_no_sample_that_reach_another_are_that_ones():
    """Noise that the model exchanges between samples, of which its inputs tell nothing."""

    def forward(self, x):
        noise = self.state(torch.eye(len(x), 4)).roll(1, 0)
        return self.head(torch.tanh(self.layer(x[:, 0]) + noise))

    model = Model(forward, layer=SIX_BY_FOUR(), state=nn.Linear(4, 6), head=nn.Linear(6, 3))
    assert_shares_of_own_loss(model, [(series([T] * N),)])


class TwoOrders(nn.Module):
    """One layer that sees the rows sample by sample and time step by time step; in training the first call may be missing."""

    def __init__(self, skips, order="time"):
        super().__init__()
        self.layer, self.skips, self.order = nn.Linear(4, 3), skips, order

    def forward(self, x):
        count, steps, _ = x.shape
        first = 0
        if self.skips == "gradient":
            with torch.set_grad_enabled(not self.training):
                first = self.layer(x.flatten(0, 1)).view(count, steps, -1).mean(1)
        elif not (self.training and self.skips == "call"):
            first = self.layer(x.flatten(0, 1)).view(count, steps, -1).mean(1)
        if self.order == "time":
            return first + self.layer(x.transpose(0, 1).flatten(0, 1)).view(steps, count, -1).tanh().mean(0)
        return first + self.layer(x.flatten(0, 1)).view(count, steps, -1).tanh().mean(1)


@pytest.mark.parametrize("skips", ["call", "gradient"])
def test_a_use_that_is_missing_in_training_is_not_taken_for_another(skips):
    x = series([T] * N)
    model = TwoOrders(skips)
    with autospec.watch(model, LABELS, quiet=True), pytest.raises(WatchError, match="less often in training"):
        model(x).square().sum().backward()
    assert_shares_of_own_loss(TwoOrders(skips, order="sample"), [(x,)])
    assert_shares_of_own_loss(TwoOrders("nothing"), [(x,)])


def test_a_use_that_is_missing_from_some_step_on_is_not_taken_for_another():
    model, x = TwoOrders("nothing"), series([T] * N)
    with autospec.watch(model, LABELS, quiet=True) as watcher:
        model(x).square().sum().backward()
        watcher.step()
        model.skips = "call"
        with pytest.raises(WatchError, match="less often in training"):
            model(x).square().sum().backward()


class Drawn(nn.Module):
    """Other samples in an order that the model draws, or counts, for itself; or noise, which moves no row."""

    def __init__(self, kind):
        super().__init__()
        self.layer, self.kind, self.count = nn.Linear(4, 3), kind, 0
        self.torchs = torch.Generator().manual_seed(0)
        self.numpys = np.random.default_rng(0)
        self.register_buffer("counted", torch.tensor(0))
        self.notes, self.scalar = {"passes": [0]}, np.int64(0)

    def forward(self, x):
        if self.kind == "counter":
            self.count += 1
        if self.kind == "buffer":
            self.counted += 1
        if self.kind == "list in a dict":
            self.notes["passes"][0] += 1
        if self.kind == "scalar of numpy":
            self.scalar = self.scalar + 1
        if self.kind == "noise":
            return self.layer(x + torch.randn(x.shape, generator=self.torchs)).tanh()
        order = {
            "torch": lambda: torch.randperm(len(x), generator=self.torchs),
            "numpy": lambda: torch.from_numpy(self.numpys.permutation(len(x))),
            "counter": lambda: torch.arange(len(x)).roll(self.count),
            "buffer": lambda: torch.arange(len(x)).roll(int(self.counted)),
            "list in a dict": lambda: torch.arange(len(x)).roll(self.notes["passes"][0]),
            "scalar of numpy": lambda: torch.arange(len(x)).roll(int(self.scalar)),
        }[self.kind]()
        return self.layer(x).tanh() * self.layer(x[order])


@pytest.mark.parametrize("kind", ["torch", "numpy", "counter", "buffer", "list in a dict", "scalar of numpy"])
def test_an_order_that_is_another_at_each_pass_is_refused(kind):
    model = Drawn(kind)
    with (
        autospec.watch(model, list("abababab"), quiet=True),
        pytest.raises(WatchError, match=r"another order at each|mix several samples"),
    ):
        model(torch.randn(8, 4))


def test_what_a_model_draws_for_itself_is_as_without_a_watcher_and_may_be_noise():
    plain, watched = (Drawn("noise") for _ in range(2))
    watched.load_state_dict(plain.state_dict())
    x = torch.randn(8, 4)
    with autospec.watch(watched, list("abababab"), quiet=True) as watcher:
        for _ in range(2):
            outputs = [model(x) for model in (plain, watched)]
            outputs[1].square().sum().backward()
            watcher.step()
            assert torch.equal(*outputs)
    assert watcher.trajectories.sizes["step"] == 2


class Depth(nn.Module):
    """Layers that are called another number of times at another pass, or in training, all with one order of rows."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.layer, self.head = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.kind, self.count, self.begun = kind, 0, False

    def forward(self, x):
        self.count += 1
        hidden = torch.tanh(self.first(x))
        if self.kind == "initialised by data" and not self.begun:
            self.begun = True
            self.layer(hidden)
        for i in range(min(self.count, 3) if self.kind == "growing" else 2):
            if not (self.kind == "dropped" and self.training and i == self.count % 2):
                hidden = hidden + torch.tanh(self.layer(hidden))
        return self.head(hidden)


@pytest.mark.parametrize("kind", ["initialised by data", "growing", "dropped"])
def test_another_number_of_uses_is_no_other_order(kind):
    model, x = Depth(kind), torch.randn(8, 4)
    recorded = 0
    with autospec.watch(model, list("abababab"), quiet=True) as watcher:
        for step in range(3):
            state = model.count, model.begun
            model.zero_grad()
            model(x).square().sum().backward()
            watcher.step()
            after = model.count, model.begun
            for group in "ab":
                model.count, model.begun = state
                model.zero_grad()
                model(x)[[label == group for label in "abababab"]].square().sum().backward()
                own = torch.linalg.svdvals(model.layer.weight.grad.double()).numpy()
                found = watcher.trajectories["layers/layer.weight/gradient"].sel(group=group).values[step]
                assert np.abs(found - own).max() < 1e-5 * own[0]
                recorded += 1
            model.count, model.begun = after
    assert recorded == 6


def test_samples_mixed_in_training_are_seen_where_a_layer_is_used_less_often_then():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            if self.training:
                return torch.tanh(self.layer(x + x.roll(1, 0)))
            return torch.tanh(self.layer(torch.tanh(self.layer(x))))

    model, said = Skips(), "In training mode rows of the input of 'layer' depend on other samples"
    with autospec.watch(model, list("abababab"), quiet=True), pytest.raises(WatchError, match=said):
        model(torch.randn(8, 4))


@pytest.mark.parametrize("positions", [6, 5], ids=["as many tokens as samples", "fewer"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_tokens_of_a_recurrent_layer_belong_to_the_sample_whose_outputs_they_make(positions, batch_first):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("tokens", torch.randn(1, positions, 3))
            self.rnn, self.head = nn.GRU(3, 4, batch_first=batch_first), nn.Linear(4, 2)

        def forward(self, x):
            tokens = self.tokens.expand(len(x), -1, -1)
            made = self.rnn(tokens)[0] if batch_first else self.rnn(tokens.transpose(0, 1))[0].transpose(0, 1)
            return self.head(made * x).flatten(1)

    assert_shares_of_own_loss(Tokens(), [(torch.randn(6, positions, 4),)], labels=list("aabbab"))


def test_a_counter_beside_a_statistic_of_the_batch_moves_no_row():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.count = nn.Linear(4, 3), nn.Linear(3, 2), 0

        def forward(self, x):
            self.count += 1
            hidden = torch.tanh(self.first(x))
            return self.second(hidden - hidden.mean(0) if self.training else hidden)

    model = Counting()
    with autospec.watch(model, list("abababab"), quiet=True) as watcher:
        model(torch.randn(8, 4)).square().sum().backward()
        watcher.step()
    assert model.count == 1
    assert list(watcher.trajectories["layers"].children) == ["first.weight", "second.weight"]


def test_distributions_that_refuse_nan_do_not_keep_rows_from_being_traced():
    class Variational(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(2, 4)

        def forward(self, x):
            mean, log_variance = self.encoder(x).chunk(2, 1)
            code = torch.distributions.Normal(mean, log_variance.exp())
            kept = code.mean + 0.1 * code.stddev
            return torch.cat(
                [self.decoder(kept), torch.distributions.kl_divergence(code, torch.distributions.Normal(0, 1))], 1
            )

    before = torch.distributions.Distribution._validate_args
    assert_shares_of_own_loss(Variational(), [(torch.randn(N, 4),)])
    assert torch.distributions.Distribution._validate_args is before


class Positions(nn.Module):
    """A table of positions that is added in one of the forms that networks have."""

    def __init__(self, added):
        super().__init__()
        self.layer, self.table, self.head = nn.Linear(4, 3), nn.Embedding(T + 1, 3), nn.Linear(3, 2)
        self.norm, self.added = nn.LayerNorm(3), added
        self.register_buffer("places", torch.arange(T + 1))

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x) + self.added(self, x)).mean(1))


POSITIONS = {
    "looked up": lambda m, x: m.table(torch.arange(T)),
    "looked up in a batch of one": lambda m, x: m.table(torch.arange(T).unsqueeze(0)),
    "a dimension afterwards": lambda m, x: m.table(torch.arange(T)).unsqueeze(0),
    "by indexing": lambda m, x: m.table(torch.arange(x.shape[1], device=x.device))[None],
    "expanded": lambda m, x: m.table(m.places[:T]).unsqueeze(0).expand(len(x), -1, -1),
    "repeated": lambda m, x: m.table(torch.arange(T)).repeat(len(x), 1, 1),
    "normalised": lambda m, x: 3 * m.norm(m.table(torch.arange(T)))[None],
    "two sums": lambda m, x: m.table(torch.arange(T))[None] + m.table(m.places[1:]),
    "its weight": lambda m, x: m.table.weight[1 : T + 1],
}


@pytest.mark.parametrize("form", POSITIONS)
def test_positions_in_the_forms_that_networks_have(form):
    torch.manual_seed(0)
    assert_shares_of_own_loss(Positions(POSITIONS[form]), [(series([T] * N),)])


class Sites(nn.Module):
    """Names of sites that come as a list or an array beside the scans, as many as samples."""

    def __init__(self, joined):
        super().__init__()
        self.table, self.layer, self.joined = nn.Embedding(7, 4), nn.Linear(8 if joined else 4, 2), joined

    def forward(self, x, sites):
        looked_up = self.table(torch.as_tensor(sites))
        return self.layer(torch.tanh(torch.cat([x, looked_up], 1) if self.joined else x + looked_up))


@pytest.mark.parametrize("array", [list, np.array])
@pytest.mark.parametrize("joined", [True, False])
def test_indices_that_are_made_of_numbers_may_be_of_samples(joined, array):
    torch.manual_seed(0)
    assert_shares_of_own_loss(Sites(joined), [(torch.randn(N, 4), array([i % 7 for i in range(N)]))])


class Auxiliary(nn.Module):
    """Two layers are used in training alone."""

    def __init__(self):
        super().__init__()
        self.layer, self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x):
        hidden = torch.tanh(self.layer(x))
        return torch.cat([hidden, self.second(torch.tanh(self.first(hidden)))], 1) if self.training else hidden


def test_all_layers_of_training_alone_are_named_with_ways_out_that_work():
    x, model = torch.randn(N, 4), Auxiliary()
    with autospec.watch(model, LABELS, quiet=True), pytest.raises(WatchError) as refusal:
        model(x).square().sum().backward()
    assert "'first.weight', 'second.weight' were used more often in training" in str(refusal.value)
    assert "rows={'first.weight': range(5)}" in str(refusal.value)
    assert "layers=['!first.weight', '!second.weight']" in str(refusal.value)
    assert_shares_of_own_loss(model, [(x,)], rows={"first.weight": range(N), "second.weight": range(N)})
    with autospec.watch(model, LABELS, layers=["!first.weight", "!second.weight"], quiet=True) as watcher:
        model(x).square().sum().backward()
        watcher.step()
    assert list(watcher.trajectories["layers"].children) == ["layer.weight"]


def test_rows_sent_to_experts_are_refused_with_a_way_out_alone():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.expert = nn.Linear(4, 2), nn.Linear(4, 3)

        def forward(self, x):
            sent = self.gate(x).argmax(1).nonzero()[:, 0]
            return x.new_zeros(len(x), 3).index_add(0, sent, self.expert(x[sent]))

    model = Experts()
    with autospec.watch(model, LABELS, quiet=True), pytest.raises(WatchError, match=r"experts.*layers=.$"):
        model(torch.randn(N, 4))


def test_a_model_that_does_not_accept_nan_is_refused_with_a_short_sentence_and_a_way_out_that_works():
    class Strict(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            if bool(x.isnan().any()):
                raise ValueError(f"no NaN, please, as in {x.tolist()}\nor elsewhere")
            return self.second(torch.tanh(self.first(x)))

    x, model = torch.randn(N, 4), Strict()
    with autospec.watch(model, LABELS, quiet=True), pytest.raises(WatchError) as refusal:
        model(x)
    said = str(refusal.value)
    assert "(ValueError: no NaN, please" in said
    assert said.endswith("give rows= for every watched layer, or let it accept NaN.")
    assert len(said) < 400
    assert "\n" not in said
    assert_shares_of_own_loss(model, [(x,)], rows={"first.weight": range(N), "second.weight": range(N)})
