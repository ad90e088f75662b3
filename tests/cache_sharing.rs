//! Random sequences that append, fork, rewrite, end and reuse each other's prefixes, in a cache that is too small for
//! them. A plain array stands for the pages: whatever happens to one sequence, each reads back its own tokens.

use c2c::{
    cache::{
        BlockPool, BlockTable, Content, Domain, Error, Fingerprint, KeyPositions, PrefixChain, longest_prefix,
    },
    rng::{Purpose, Rng, Stream},
};

const BLOCK: usize = 4;
const BLOCKS: usize = 24;

struct Sequence {
    table: BlockTable,
    tokens: Vec<u32>,
}

struct World {
    pool: BlockPool,
    domain: Domain,
    /// What each slot holds.
    pages: Vec<u32>,
    live: Vec<Sequence>,
    refused: usize,
    reused: usize,
    copied: usize,
}

impl World {
    fn new() -> World {
        let print = |text: &str| Fingerprint::of([text.as_bytes()]);
        World {
            pool: BlockPool::new(BLOCKS, BLOCK).unwrap(),
            domain: Domain {
                model: print("model"),
                tokenizer: print("tokenizer"),
                content: Content::Plain,
                keys: KeyPositions::PostRope,
                salt: String::new(),
            },
            pages: vec![u32::MAX; BLOCKS * BLOCK],
            live: Vec::new(),
            refused: 0,
            reused: 0,
            copied: 0,
        }
    }

    fn write(&mut self, which: usize, at: usize, tokens: &[u32]) -> Result<(), Error> {
        let Sequence { table, tokens: all } = &mut self.live[which];
        let end = at + tokens.len();
        let copies = table.make_writable(at..end)?;
        self.copied += copies.len();
        for (from, to) in copies {
            self.pages[to as usize] = self.pages[from as usize];
        }
        if end > table.len() {
            table.append(end - table.len())?;
        }
        for (slot, &token) in table.slots(at..end)?.into_iter().zip(tokens) {
            self.pages[slot as usize] = token;
        }
        all.truncate(at);
        all.extend_from_slice(tokens);
        Ok(())
    }

    /// Starts a sequence on what is cached of it.
    fn start(&mut self, tokens: &[u32]) -> Result<(), Error> {
        let hashes = PrefixChain::hashes(&self.domain, tokens, BLOCK);
        let table = BlockTable::with_prefix(&self.pool, longest_prefix(&self.pool, &hashes));
        let cached = table.len();
        self.reused += cached;
        self.live.push(Sequence { table, tokens: tokens[..cached].to_vec() });
        let which = self.live.len() - 1;
        let written = self.write(which, cached, &tokens[cached..]);
        if written.is_err() {
            self.live.pop();
            return written;
        }
        for (hash, block) in hashes.iter().zip(self.live[which].table.blocks()) {
            self.pool.publish(*hash, block);
        }
        Ok(())
    }

    fn check(&self) {
        let mut held = std::collections::HashSet::new();
        for Sequence { table, tokens } in &self.live {
            assert_eq!(table.len(), tokens.len());
            let slots = table.slots(0..table.len()).unwrap();
            let found: Vec<u32> = slots.iter().map(|&slot| self.pages[slot as usize]).collect();
            assert_eq!(&found, tokens);
            held.extend(table.block_ids());
        }
        assert_eq!(self.pool.used(), held.len(), "a block leaked or is held by nobody who knows");
        assert_eq!(self.pool.used() + self.pool.available(), BLOCKS);
    }
}

#[test]
fn every_sequence_reads_its_own_tokens() {
    let (mut refused, mut reused, mut copied) = (0, 0, 0);
    for seed in 0..40 {
        let mut world = World::new();
        for step in 0..300 {
            let rng = Rng::new(seed, Stream::new(Purpose::Init, 0), step);
            let pick = |index: u32, n: usize| rng.bits(index) as usize % n;
            let which = (!world.live.is_empty()).then(|| pick(0, world.live.len()));
            let result = match (pick(1, 6), which) {
                (0 | 1, _) | (_, None) => {
                    // Few different texts, so that prefixes are met again.
                    let tokens: Vec<u32> =
                        (0..4 + pick(2, 16) as u32).map(|i| i + pick(3, 3) as u32).collect();
                    world.start(&tokens)
                }
                (2, Some(which)) => {
                    let new: Vec<u32> = (0..1 + pick(2, 5) as u32).map(|i| 1000 * step + i).collect();
                    world.write(which, world.live[which].tokens.len(), &new)
                }
                (3, Some(which)) => {
                    let Sequence { table, tokens } = &world.live[which];
                    let fork = Sequence { table: table.fork(), tokens: tokens.clone() };
                    world.live.push(fork);
                    Ok(())
                }
                (4, Some(which)) => {
                    // Go back and say something else.
                    let at = pick(2, world.live[which].tokens.len() + 1);
                    world.live[which].table.truncate(at);
                    world.live[which].tokens.truncate(at);
                    world.write(which, at, &[1000 * step, 1000 * step + 1])
                }
                (_, Some(which)) => {
                    world.live.swap_remove(which);
                    Ok(())
                }
            };
            match result {
                Ok(()) => {}
                Err(Error::OutOfBlocks { wanted, free, total }) => {
                    assert!(wanted > free && total == BLOCKS);
                    world.refused += 1;
                    if let Some(which) = which.filter(|&which| which < world.live.len()) {
                        world.live.swap_remove(which);
                    }
                }
                Err(other) => panic!("seed {seed}, step {step}: {other}"),
            }
            world.check();
        }
        world.live.clear();
        world.check();
        assert_eq!(world.pool.used(), 0);
        refused += world.refused;
        reused += world.reused;
        copied += world.copied;
    }
    assert!(refused > 0 && reused > 0 && copied > 0, "{refused} refused, {reused} reused, {copied} copied");
}
