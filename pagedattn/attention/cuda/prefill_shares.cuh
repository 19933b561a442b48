// Shares of keys: into how many a sequence's are divided, which the kernel that makes them and the one that merges
// them have to agree on.
#pragma once

constexpr int MOST_SHARES = 64;

// A share has `share_tiles` tiles of keys at most, unless that would make more than `splits` of them. All tiles of a
// sequence's queries have as many: of a prompt, whose first ones see few keys, some shares are empty.
template <typename Parameters>
DEVICE int shares_of(const Parameters &p, int kv_length) {
    int tiles = (min(kv_length, p.most_keys) + KV_TILE - 1) / KV_TILE;
    return max(1, min((tiles + p.share_tiles - 1) / p.share_tiles, p.splits));
}
