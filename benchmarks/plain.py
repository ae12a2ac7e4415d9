"""One training step as the paper's released code does it: what our own step is measured against.

An independent implementation of what that code computes, including its slow and unused parts; the
weights are random, each call is one optimizer step. Where the code is ambiguous, the cheaper
interpretation is used. Sizes are the paper's unless stated otherwise.

usage: python benchmarks/plain.py [--full]   (one step and its losses; tiny, or paper size: ~6 GB)
"""

import argparse
import time

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers import BertConfig, BertForMaskedLM

PAD, CLS, MASK, STOP, NUMBERS, WORDS = 0, 2, 4, 18, range(19, 29), 29  # token ids; words from 29 on
TINY = dict(
    size=(32, 32, 16),
    patch=(8, 8, 4),
    dim=24,
    depth=2,
    heads=2,
    decoder_dim=32,
    decoder_heads=4,
    vocab=100,
    text_dim=24,
    text_depth=2,
    text_heads=2,
    length=96,
    words_depth=1,
    words_hidden=32,
)


class Block(
    nn.Module
):  # of the image's encoder and decoder; attention step by step, its whole matrix in memory
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def attend(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (three h c) -> three b h n c", three=3, h=self.heads)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return self.out(rearrange(weights @ v, "b h n c -> b n (h c)"))

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Fusion(nn.Module):  # words look at words, then at the image
    def __init__(self, dim, heads):
        super().__init__()
        self.own, self.look = (
            nn.MultiheadAttention(dim, heads, batch_first=True) for _ in range(2)
        )
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, context, pad, similarity):  # the last is handed over and not used
        x = self.norm1(x + self.own(x, x, x, key_padding_mask=pad, need_weights=False)[0])
        return self.norm2(x + self.look(x, context, context, need_weights=False)[0])


def head(dim, to):
    return nn.Sequential(nn.Linear(dim, to), nn.GELU(), nn.LayerNorm(to), nn.Linear(to, to))


def bert(vocab, dim, depth, heads, hidden, length, **dropout):
    return BertForMaskedLM(
        BertConfig(
            vocab_size=vocab,
            hidden_size=dim,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=hidden,
            max_position_embeddings=length,
            **dropout,
        )
    )


def sentences(
    ids,
):  # number of each token's sentence from 1 on; 0 after the last full stop, padding included
    of, n, start = [0] * len(ids), 0, 0
    for i, t in enumerate(ids):
        if t != STOP or {*ids[max(i - 1, 0) : i], *ids[i + 1 : i + 2]} & {*NUMBERS}:
            continue
        n += 1
        of[start : i + 1], start = [n] * (i + 1 - start), i + 1
    return of


class Plain(nn.Module):
    "The released model and its losses, all of weight 1"

    def __init__(
        self,
        size=(224, 224, 112),
        patch=(16, 16, 8),
        dim=768,
        depth=12,
        heads=12,
        visible=0.25,
        decoder_dim=768,
        decoder_depth=4,
        decoder_heads=16,
        organs=8,
        vocab=30522,
        text_dim=768,
        text_depth=12,
        text_heads=12,
        length=512,
        words_depth=6,
        words_heads=6,
        words_hidden=1536,
    ):
        super().__init__()
        self.size, self.patch, self.visible, self.n, self.vocab, self.length = (
            size,
            patch,
            visible,
            organs + 1,
            vocab,
            length,
        )
        voxels, n = (
            patch[0] * patch[1] * patch[2],
            (size[0] // patch[0]) * (size[1] // patch[1]) * (size[2] // patch[2]),
        )
        self.embed, self.cls, self.pos = (
            nn.Conv3d(1, dim, patch, patch),
            *(nn.Parameter(torch.randn(1, k, dim) * 0.02) for k in (1, n + 1)),
        )
        self.blocks, self.norm = (
            nn.Sequential(*[Block(dim, heads) for _ in range(depth)]),
            nn.LayerNorm(dim, eps=1e-6),
        )
        self.to_decoder, self.hidden = (
            nn.Linear(dim, decoder_dim),
            nn.Parameter(torch.randn(1, 1, decoder_dim) * 0.02),
        )
        self.decoder_pos = nn.Parameter(torch.randn(1, n + 1, decoder_dim) * 0.02)
        self.decoder = nn.ModuleList(
            Block(decoder_dim, decoder_heads) for _ in range(decoder_depth)
        )
        self.organs = nn.Sequential(
            nn.Linear(decoder_dim, self.n),
            nn.LayerNorm(self.n),
            nn.ReLU(),
            nn.Linear(self.n, self.n),
        )
        self.voxels = nn.Sequential(
            nn.LayerNorm(decoder_dim, eps=1e-6), nn.Linear(decoder_dim, voxels)
        )
        self.bert = bert(
            vocab,
            text_dim,
            text_depth,
            text_heads,
            4 * text_dim,
            length,
            hidden_dropout_prob=0.25,
            attention_probs_dropout_prob=0.1,
        ).requires_grad_(False)
        self.image_head, self.k = head(dim, text_dim), nn.Linear(text_dim, 1)
        self.text_head, self.word_head = (head(text_dim, text_dim) for _ in range(2))
        self.to_words, self.mean, self.fusion = (
            nn.Linear(dim, text_dim),
            nn.Linear(text_dim, text_dim),
            Fusion(text_dim, text_heads),
        )
        self.words = bert(vocab, text_dim, words_depth, words_heads, words_hidden, 256)

    def patches(self, x):  # (B,H,W,D,C) -> (B,N,voxels,C)
        p, q, r = self.patch
        return rearrange(x, "b (h p) (w q) (d r) c -> b (h w d) (p q r) c", p=p, q=q, r=r)

    def encode(
        self, patches
    ):  # (B,N,voxels) -> (B,1+V,C), (B,N) 1 where hidden, (B,N) order that puts tokens back
        p, q, r = self.patch
        x = self.embed(
            rearrange(patches, "b n (p q r) -> (b n) 1 p q r", p=p, q=q, r=r)
        )  # every patch, also those that are dropped next
        x = rearrange(x, "(b n) c 1 1 1 -> b n c", b=len(patches)) + self.pos[:, 1:]
        order = torch.rand(x.shape[:2], device=x.device).argsort(1)
        back, n = order.argsort(1), int(x.shape[1] * self.visible)
        x = x.gather(1, order[:, :n, None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([(self.cls + self.pos[:, :1]).expand(len(x), -1, -1), x], 1)
        return self.norm(self.blocks(x)), (back >= n).float(), back

    def decode(self, latent, back):  # (B,N,organs+1) logits, (B,N,voxels)
        x = self.to_decoder(latent)
        full = torch.cat(
            [x[:, 1:], self.hidden.to(x.dtype).expand(len(x), back.shape[1] + 1 - x.shape[1], -1)],
            1,
        )
        full = full.gather(1, back[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], full], 1) + self.decoder_pos
        for i, b in enumerate(self.decoder):
            x = b(x)
            if i == 1:
                organs = self.organs(x[:, 1:])
        return organs, self.voxels(x[:, 1:])

    def features(self, ids, mask):  # the frozen BERT, with dropout, and its logits for nothing
        return self.bert(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]

    def align(
        self, x, words, of
    ):  # (B,V,C), (B,L-1,C), (B,L-1) -> loss, (B,S,V) similarity, (B,S,C) regions
        x, words, most = self.image_head(x), self.text_head(words), int(of.max())
        text = torch.stack(
            [
                torch.stack(
                    [
                        words[b][of[b] == s].mean(0)
                        if (of[b] == s).any()
                        else words.new_zeros(words.shape[-1])
                        for s in range(1, most + 1)
                    ]
                )
                for b in range(len(of))
            ]
        )
        k = 2 ** (3 * torch.sigmoid(self.k(text)[..., 0]) + 4).int()  # no gradient passes here
        sim = F.normalize(text, dim=-1) @ F.normalize(x, dim=-1).transpose(1, 2)
        at = sim.topk(min(int(k.max()), x.shape[1]), -1).indices
        near = (
            x[:, None]
            .expand(-1, most, -1, -1)
            .gather(2, at[..., None].expand(-1, -1, -1, x.shape[-1]))
        )
        count = k.clamp(max=x.shape[1])
        chosen = torch.arange(at.shape[-1], device=x.device) < count[..., None]
        region = (near * chosen[..., None]).sum(2) / count[..., None]
        logits = (
            F.normalize(region, dim=-1) @ F.normalize(text, dim=-1).transpose(1, 2) / 0.07
        )  # within each report, absent sentences too
        own = torch.arange(most, device=x.device).expand(len(of), -1)
        real = (of[:, :, None] == own[:, None] + 1).any(1)
        return (
            sum(F.cross_entropy(z[real], own[real]) for z in (logits, logits.transpose(1, 2))),
            sim,
            region,
        )

    def report(self, latent, features, real, sim, of, region):  # (B,L,vocab) logits
        similarity = []
        for s, o in zip(sim, of):  # each word's row of its sentence; leads nowhere
            rows = s[o[o > 0] - 1]
            similarity.append(F.pad(rows, (0, 0, 0, self.length - len(rows))))
        image = self.to_words(latent)
        context = torch.cat([0.2 * region.mean(1, keepdim=True), image[:, 1:]], 1)
        x = self.fusion(self.word_head(features), context, ~real, 0.02 * torch.stack(similarity))
        x = x + self.mean(image[:, 1:].mean(1, keepdim=True))
        seen = real[:, None, None].expand(-1, 1, self.length, -1)
        return self.words.cls(self.words.bert.encoder(x, seen).last_hidden_state)

    def losses(self, batch):
        patches = self.patches(batch["image"][:, 0, ..., None])[..., 0]
        onehot = F.one_hot(batch["organs"].long(), self.n)  # eight bytes for each voxel and organ
        shares = self.patches(onehot).float().mean(2)
        latent, hidden, back = self.encode(patches)
        a, b = (
            self.features(batch[k], (batch[m] != PAD).long())
            for k, m in (("a", "a"), ("masked", "b"))
        )
        align, sim, region = self.align(latent[:, 1:], a[:, 1:], batch["of"][:, 1:])
        organs, voxels = self.decode(latent, back)
        logits = self.report(latent, b, batch["b"] != PAD, sim, batch["of"][:, 1:], region)
        return dict(
            voxels=(((voxels - patches) ** 2).mean(-1) * hidden).mean(),  # hidden patches, over all
            organs=F.binary_cross_entropy_with_logits(organs, shares),
            align=align,
            words=F.cross_entropy(logits.flatten(0, 1), batch["b"].flatten()),
        )  # every position, padding too

    def forward(self, batch):
        losses = self.losses(batch)
        self.parts = {k: v.detach() for k, v in losses.items()}
        return sum(losses.values())

    def batch(
        self, seed, n=1
    ):  # from the loader: voxels, organs, findings, with an impression, with masked words
        g = torch.Generator().manual_seed(seed)
        coarse = torch.randint(self.n, (n, 1, 9, 9, 9), generator=g).float()
        a, b = (torch.full((n, self.length), PAD) for _ in range(2))
        for row in range(n):
            a[row], b[row] = self.texts(g)
        hide = torch.rand(b.shape, generator=g) < 0.75
        hide[:, 0] = hide[:, -1] = False
        image, organs = (
            torch.rand(n, 1, *self.size, generator=g) * 2 - 1,
            F.interpolate(coarse, self.size)[:, 0].byte(),
        )
        of = torch.tensor([sentences(ids) for ids in a.tolist()])
        return dict(image=image, organs=organs, a=a, b=b, masked=b.masked_fill(hide, MASK), of=of)

    def texts(self, g):  # two rows of ids, 250 and 312 of 512 real, a sentence about every 20
        real = self.length * 125 // 256
        ids = torch.randint(WORDS, self.vocab, (self.length,), generator=g)
        ids[0], n = CLS, real // 20
        ids[[real * (i + 1) // n - 1 for i in range(n)]] = STOP
        ids[4:7] = torch.tensor([NUMBERS[1], STOP, NUMBERS[2]])  # a decimal, which ends no sentence
        ids[real + real // 4 - 1], end = STOP, torch.arange(self.length)
        return ids.masked_fill(end >= real, PAD), ids.masked_fill(end >= real + real // 4, PAD)


def optimiser(model):  # no decay of biases and norms
    named = [p for p in model.parameters() if p.requires_grad]
    groups = [
        dict(params=[p for p in named if (p.ndim > 1) == bool(decay)], weight_decay=decay)
        for decay in (0.05, 0.0)
    ]
    return torch.optim.AdamW(groups, lr=1.5e-4, betas=(0.9, 0.95))


def step(model, opt, batch, dtype=torch.float32):
    "Forward and backward, both under autocast to `dtype`, and one step of the optimiser"
    with torch.autocast(batch["image"].device.type, dtype, enabled=dtype != torch.float32):
        loss = model(batch)
        opt.zero_grad()
        loss.backward()
    opt.step()
    return loss.detach()


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--full", action="store_true", help="the paper's sizes")
    a = p.parse_args()
    torch.manual_seed(0)
    model = Plain(**{} if a.full else TINY).train()
    opt, batch = optimiser(model), model.batch(0)
    start = time.perf_counter()
    loss = step(model, opt, batch)
    took, size = time.perf_counter() - start, sum(q.numel() for q in model.parameters()) / 1e6
    parts = ", ".join(f"{k} {float(v):.3f}" for k, v in model.parts.items())
    print(
        f"{took:.2f} s; loss {float(loss):.3f}: {parts}; "
        f"{int(batch['of'].max())} sentences, {size:.1f} M parameters"
    )


if __name__ == "__main__":
    main()
