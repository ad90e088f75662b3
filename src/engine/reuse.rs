//! Which part of a prompt's cache may come from earlier requests.
//!
//! Only blocks that prompts filled are shared: a decoded token's keys and values have other low bits than the same token's read
//! as part of a prompt, and an answer shall not depend on what was asked before.

use crate::{
    cache::{BlockHash, BlockPool, Domain, PrefixChain, longest_prefix},
    pipeline::{Lane, Prompt},
};

/// Hashes of the full blocks of `ids`, read by one model alone.
pub(super) fn plain(domain: &Domain, ids: &[u32], positions: &[u32], block_size: usize) -> Vec<BlockHash> {
    let mut chain = PrefixChain::new(domain);
    let blocks = ids.chunks_exact(block_size).zip(positions.chunks_exact(block_size)).zip(0u32..);
    let hash = |((ids, positions), block): ((&[u32], &[u32]), u32)| {
        // Most often positions count the tokens; then the same text is one block whoever asks.
        let first = block * block_size as u32;
        let counted = positions.iter().copied().eq(first..first + block_size as u32);
        chain.push(ids, if counted { &[] } else { positions })
    };
    blocks.map(hash).collect()
}

/// Hashes of the full blocks of the receiver's part of a fused prompt: of its tokens, where sections begin, which columns are
/// added, and what the sharers read up to the last of them.
pub(super) fn fused(domain: &Domain, prompt: &Prompt, block_size: usize) -> Vec<BlockHash> {
    let mut chain = PrefixChain::new(domain);
    let sections = prompt.sections.iter().enumerate().flat_map(|(index, section)| {
        let mask = if index + 1 == prompt.sections.len() { 0 } else { section.sharer_mask };
        (0..section.len).map(move |token| (mask, u32::from(token == 0)))
    });
    let sections: Vec<(u32, u32)> = sections.collect();
    let mut read = vec![0; prompt.sharers.len()];
    let mut hashes = Vec::new();
    for (ids, start) in prompt.ids.chunks_exact(block_size).zip((0..).step_by(block_size)) {
        let mut companions = Vec::new();
        for token in start..start + block_size {
            let (mask, begins) = sections.get(token).copied().unwrap_or_default();
            companions.extend([prompt.positions[token], mask, begins]);
            for (sharer, own) in prompt.sharers.iter().enumerate() {
                let column = own.columns.get(token).copied().flatten().filter(|_| mask >> sharer & 1 == 1);
                companions.push(column.map_or(0, |column| column + 1));
            }
        }
        for (index, (sharer, read)) in prompt.sharers.iter().zip(&mut read).enumerate() {
            let columns = sharer.columns.iter().zip(&sections).take(start + block_size);
            let used =
                columns.filter(|(_, (mask, _))| mask >> index & 1 == 1).filter_map(|(column, _)| *column);
            let end = used.max().map_or(0, |last| last as usize + 1).max(*read);
            companions.push((end - *read) as u32);
            companions.extend(&sharer.ids[*read..end]);
            companions.extend(&sharer.positions[*read..end]);
            *read = end;
        }
        hashes.push(chain.push(ids, &companions));
    }
    hashes
}

/// Whether the receiver may go on from a cache of `tokens` tokens of `prompt`. Not from inside a section that is fused, whose
/// tokens attend to what was there before the fusion; not with a single token left of a section that has more, which would be
/// another pass; not without any token left.
pub(super) fn may_go_on(prompt: &Prompt, tokens: usize) -> bool {
    let mut start = 0;
    for (index, section) in prompt.sections.iter().enumerate() {
        let end = start + section.len;
        if tokens < end {
            let fused = section.sharer_mask != 0 && index + 1 < prompt.sections.len();
            return tokens == start || (!fused && end - tokens > 1);
        }
        start = end;
    }
    false
}

/// Begins `lane` with the longest cached part of `ids` that `may_go_on`; returns how many tokens that is.
pub(super) fn begin(
    lane: &mut Lane,
    hashes: &[BlockHash],
    ids: &[u32],
    positions: &[u32],
    may_go_on: impl Fn(usize) -> bool,
) -> Result<usize, crate::pipeline::Error> {
    let pool: &BlockPool = lane.kv.pool();
    let size = pool.block_size();
    let mut blocks = longest_prefix(pool, hashes);
    while !blocks.is_empty() && !may_go_on(blocks.len() * size) {
        blocks.pop();
    }
    let tokens = blocks.len() * size;
    if tokens > 0 {
        lane.begin_with(blocks, &ids[..tokens], positions[tokens - 1] + 1)?;
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        align::Section,
        cache::{Content, Fingerprint, KeyPositions},
        pipeline::SharerPrompt,
    };
    use std::collections::HashSet;

    fn domain() -> Domain {
        let print = |text: &str| Fingerprint::of([text.as_bytes()]);
        Domain {
            model: print("model"),
            tokenizer: print("tokenizer"),
            content: Content::Plain,
            keys: KeyPositions::PostRope,
            salt: String::new(),
        }
    }

    /// 12 tokens, of which 2..7 are fused with one sharer's 1..6.
    fn prompt() -> Prompt {
        let section = |len, sharer_mask| Section { len, sharer_mask };
        let columns = (0..12).map(|token| (2..7).contains(&token).then(|| token - 1));
        Prompt {
            ids: (100..112).collect(),
            positions: (0..12).collect(),
            sharers: vec![SharerPrompt {
                ids: (200..206).collect(),
                positions: (0..6).collect(),
                columns: columns.collect(),
            }],
            sections: vec![section(2, 0), section(5, 1), section(5, 0)],
        }
    }

    #[test]
    fn a_cache_ends_where_the_receiver_can_go_on() {
        let prompt = prompt();
        let possible: Vec<usize> = (0..14).filter(|&tokens| may_go_on(&prompt, tokens)).collect();
        // 1 leaves a single token of a section, 3 to 6 lie inside the fused one, 11 leaves a single token.
        assert_eq!(possible, [0, 2, 7, 8, 9, 10]);
    }

    #[test]
    fn whatever_a_fused_block_was_made_of_counts() {
        type Change = fn(&mut Prompt);
        let changes: [Change; 8] = [
            |_| {},
            |p| p.ids[0] += 1,
            |p| p.positions[3] += 1,
            |p| p.sharers[0].ids[2] += 1,
            |p| p.sharers[0].positions[2] += 1,
            |p| p.sharers[0].columns[2] = None,
            |p| p.sections[1].sharer_mask = 0,
            |p| {
                p.sections[0].len += 1;
                p.sections[1].len -= 1;
            },
        ];
        let first = |change: Change| {
            let mut prompt = prompt();
            change(&mut prompt);
            fused(&domain(), &prompt, 4)[0]
        };
        let hashes: HashSet<BlockHash> = changes.into_iter().map(first).collect();
        assert_eq!(hashes.len(), changes.len());
        // What the sharer reads later does not count.
        let later: Change = |p| p.sharers[0].ids[5] += 1;
        assert_eq!(first(|_| {}), first(later));
        let last = |change: Change| {
            let mut prompt = prompt();
            change(&mut prompt);
            fused(&domain(), &prompt, 4)[2]
        };
        assert_ne!(last(|_| {}), last(later));
    }

    #[test]
    fn plain_blocks_count_positions_only_where_they_are_unusual() {
        let ids: Vec<u32> = (0..9).collect();
        let counted: Vec<u32> = (0..9).collect();
        let mut shifted = counted.clone();
        shifted[5] += 1;
        let (a, b) = (plain(&domain(), &ids, &counted, 4), plain(&domain(), &ids, &shifted, 4));
        assert_eq!((a.len(), a[0] == b[0], a[1] == b[1]), (2, true, false));
        assert_eq!(a, PrefixChain::hashes(&domain(), &ids, 4));
    }
}
