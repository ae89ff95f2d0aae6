//! What the cache must hold, and how it may change.

use super::rows::{self, BLOCK, HEAD_DIM, HEADS, LAYERS, Row};
use crate::common::Random;
use kvarn::calibration::Calibration;
use kvarn::format::Format;
use kvarn::paging::{BlockId, SequenceId};
use kvarn::quant::LayerCalibration;
use kvarn::{CacheConfig, Error, PagedKvCache, Step};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// Kinds of outcome that are counted.
pub const OUTCOMES: usize = 15;
const MAX_SEQUENCES: usize = 6;

#[derive(Debug, Clone, Copy)]
pub struct Setup {
    pub format: Format,
    pub calibrated: bool,
    pub num_blocks: Option<usize>,
    pub num_open_pages: Option<usize>,
    pub window: Option<usize>,
}

#[derive(Clone)]
pub(super) struct Tokens {
    pub(super) id: SequenceId,
    /// Of every committed token.
    pub(super) ids: Vec<u32>,
    /// What was last read of them; empty rows before the first held.
    pub(super) rows: Vec<Row>,
    pub(super) pending: bool,
}

pub(super) struct Open {
    pub(super) step: Step,
    /// Sequences, and the ids of their new tokens.
    pub(super) parts: Vec<(SequenceId, Vec<u32>)>,
    /// Full blocks of committed tokens that it reads as tiles, and will seal.
    pub(super) due: HashSet<BlockId>,
    pub(super) appended: bool,
}

pub struct Model {
    pub(super) setup: Setup,
    pub(super) cache: PagedKvCache,
    pub(super) layers: Option<Vec<Arc<LayerCalibration>>>,
    pub(super) random: Random,
    /// By token id.
    pub(super) given: Vec<Row>,
    pub(super) sequences: Vec<Tokens>,
    pub(super) steps: Vec<Open>,
    pub(super) sealed: HashSet<BlockId>,
    /// Full blocks as last read, by which a prefix that nobody holds is known.
    pub(super) blocks: HashMap<BlockId, Vec<Row>>,
    pub(super) published: Vec<Vec<u32>>,
    pub(super) num_sealed: usize,
    pub(super) num_unsealed: usize,
    pub outcomes: BTreeMap<&'static str, usize>,
}

impl Model {
    pub fn new(setup: Setup, random: Random) -> Self {
        let Setup { format, num_blocks, num_open_pages, window, .. } = setup;
        let config = CacheConfig {
            format,
            num_blocks,
            num_open_pages,
            window,
            block_size: BLOCK,
            ..CacheConfig::new(LAYERS, HEADS, HEAD_DIM)
        };
        let mut cache = PagedKvCache::new(config).unwrap();
        let calibration: Option<Arc<Calibration>> = setup.calibrated.then(rows::calibration);
        let layers = calibration.as_ref().map(|known| (0..LAYERS).map(|layer| known.layer(layer).unwrap()).collect());
        if let Some(calibration) = calibration {
            cache.set_calibration(calibration, (0..LAYERS).collect()).unwrap();
        }
        let mut model = Self {
            setup,
            cache,
            layers,
            random,
            given: Vec::new(),
            sequences: Vec::new(),
            steps: Vec::new(),
            sealed: HashSet::new(),
            blocks: HashMap::new(),
            published: Vec::new(),
            num_sealed: 0,
            num_unsealed: 0,
            outcomes: BTreeMap::new(),
        };
        model.add();
        model
    }

    fn add(&mut self) {
        let id = self.cache.new_sequence();
        self.sequences.push(Tokens { id, ids: Vec::new(), rows: Vec::new(), pending: false });
    }

    pub(super) fn count(&mut self, outcome: &'static str) {
        *self.outcomes.entry(outcome).or_default() += 1;
    }

    /// A settled sequence, if there is one.
    pub(super) fn pick(&mut self) -> Option<usize> {
        let settled: Vec<usize> = (0..self.sequences.len()).filter(|&i| !self.sequences[i].pending).collect();
        (!settled.is_empty()).then(|| self.random.pick(&settled))
    }

    pub(super) fn table(&self, id: SequenceId) -> Vec<BlockId> {
        self.cache.block_table(id).unwrap().to_vec()
    }

    pub(super) fn held(&self, id: SequenceId) -> HashSet<BlockId> {
        self.table(id).into_iter().filter(|&block| block != BlockId::RELEASED).collect()
    }

    /// Blocks that a sequence ends within.
    pub(super) fn partly_used(&self) -> HashSet<BlockId> {
        let partly = self.sequences.iter().filter(|tokens| !tokens.ids.len().is_multiple_of(BLOCK));
        partly.map(|tokens| self.table(tokens.id)[tokens.ids.len() / BLOCK]).collect()
    }

    pub fn apply(&mut self, roll: usize, context: &str) {
        let mut sealing = HashSet::new();
        match roll {
            0..4 if self.sequences.len() < MAX_SEQUENCES => self.add(),
            4..12 if self.sequences.len() < MAX_SEQUENCES => self.fork(),
            12..18 if self.sequences.len() > 1 => self.free(),
            18..33 => self.truncate(),
            33..38 => self.publish(),
            38..46 if self.sequences.len() < MAX_SEQUENCES => self.find(),
            46..48 if self.steps.is_empty() => self.cache = self.cache.try_clone().unwrap(),
            48..55 if !self.steps.is_empty() => self.abort(),
            55..75 if !self.steps.is_empty() => sealing = self.commit(context),
            _ if self.steps.len() < 2 => self.begin(),
            _ => sealing = self.commit(context),
        }
        self.check(&sealing, context);
    }

    fn fork(&mut self) {
        let Some(parent) = self.pick() else { return };
        let id = self.cache.fork(self.sequences[parent].id).unwrap();
        let child = Tokens { id, ..self.sequences[parent].clone() };
        self.sequences.push(child);
    }

    fn free(&mut self) {
        let Some(index) = self.pick() else { return };
        self.cache.free(self.sequences.remove(index).id).unwrap();
    }

    fn truncate(&mut self) {
        let Some(index) = self.pick() else { return };
        let (id, len) = (self.sequences[index].id, self.sequences[index].ids.len());
        let target = self.random.below(len + 1);
        let unseal = self.random.below(3) > 0;
        let within = (target < len && !target.is_multiple_of(BLOCK)).then(|| self.table(id)[target / BLOCK]);
        let is_sealed = within.is_some_and(|block| self.sealed.contains(&block));
        let stats = self.cache.stats().unwrap();
        let foreseen = self.cache.check_truncate(&[(id, target)]);
        assert_eq!(self.cache.stats().unwrap(), stats);
        let result = if unseal { self.cache.truncate_unsealing(id, target) } else { self.cache.truncate(id, target) };
        if unseal {
            assert_eq!(result, foreseen);
        }
        match result {
            Ok(()) => {
                self.sequences[index].ids.truncate(target);
                self.sequences[index].rows.truncate(target);
                if is_sealed {
                    assert!(unseal, "a sealed block cannot be cut");
                    self.num_unsealed += 1;
                    self.count("unsealed");
                    let (from, block) = (target - target % BLOCK, self.table(id)[target / BLOCK]);
                    self.sealed.remove(&block);
                    let kept = rows::stored(&self.cache, id, from, target);
                    assert!(rows::are_near(&kept, &self.sequences[index].rows[from..]), "kept rows moved too far");
                    self.sequences[index].rows[from..].clone_from_slice(&kept);
                } else if within.is_some() {
                    self.count("cut in a page");
                }
            }
            Err(error) => {
                assert_eq!(self.cache.stats().unwrap(), stats);
                match error {
                    Error::Sealed { requested, .. } => {
                        assert!(is_sealed && !unseal && requested == target);
                        self.count("sealed");
                    }
                    Error::RollbackTooFar { .. } => assert!(self.setup.window.is_some()),
                    Error::OutOfBlocks { needed, free } | Error::OutOfOpenPages { needed, free } => {
                        assert!(is_sealed && unseal && needed > free);
                        self.count("no room to unseal");
                    }
                    other => panic!("{other}"),
                }
            }
        }
    }

    fn publish(&mut self) {
        let Some(index) = self.pick() else { return };
        let tokens = &self.sequences[index];
        if self.cache.publish_prefix(tokens.id, &tokens.ids).unwrap() > 0 {
            self.published.push(tokens.ids.clone());
        }
    }

    fn find(&mut self) {
        if self.published.is_empty() {
            return;
        }
        let mut ids = self.published[self.random.below(self.published.len())].clone();
        ids.push(u32::MAX);
        let id = self.cache.match_prefix(&ids);
        ids.truncate(self.cache.sequence(id).unwrap().len());
        let rows: Vec<Row> = self.table(id).iter().flat_map(|block| self.blocks[block].clone()).collect();
        self.count(if ids.is_empty() { "no prefix" } else { "prefix" });
        self.sequences.push(Tokens { id, ids, rows, pending: false });
    }

    pub(super) fn tokens(&self, id: SequenceId) -> &Tokens {
        self.sequences.iter().find(|tokens| tokens.id == id).unwrap()
    }

    pub(super) fn tokens_mut(&mut self, id: SequenceId) -> &mut Tokens {
        self.sequences.iter_mut().find(|tokens| tokens.id == id).unwrap()
    }

    /// Reads everything that no step is open on. Blocks of `sealing` are tiles from now on, all others as they were.
    fn check(&mut self, sealing: &HashSet<BlockId>, context: &str) {
        let mut found = HashSet::new();
        for index in 0..self.sequences.len() {
            let Tokens { id, ref ids, pending, .. } = self.sequences[index];
            if pending {
                continue;
            }
            let (table, len) = (self.table(id), ids.len());
            let first = self.cache.sequence(id).unwrap().first_held();
            let now = rows::stored(&self.cache, id, first, len);
            for block in first / BLOCK..len.div_ceil(BLOCK) {
                let (from, to) = (block * BLOCK, len.min((block + 1) * BLOCK));
                let (before, now) = (&self.sequences[index].rows[from..to], &now[from - first..to - first]);
                if sealing.contains(&table[block]) {
                    let layers = self.layers.as_deref();
                    let is_tile = rows::is_tile_of(now, before, self.setup.format, layers, block == 0, false);
                    assert!(is_tile, "{context}: block {block} of {id:?} is no tile of its page");
                    found.insert(table[block]);
                } else {
                    assert!(before == now, "{context}: block {block} of {id:?} has changed");
                }
                if to - from == BLOCK {
                    self.blocks.insert(table[block], now.to_vec());
                }
            }
            self.sequences[index].rows[first..].clone_from_slice(&now);
        }
        assert_eq!(&found, sealing, "{context}");
        found.iter().for_each(|_| self.count("sealed from a page"));
        self.sealed.extend(found);
        let held: HashSet<BlockId> = self.sequences.iter().flat_map(|tokens| self.held(tokens.id)).collect();
        let stats = self.cache.stats().unwrap();
        assert_eq!(stats.blocks_in_use, held.len(), "{context}");
        assert_eq!(stats.open_pages, held.difference(&self.sealed).count(), "{context}");
        assert_eq!((stats.sealed, stats.unsealed), (self.num_sealed, self.num_unsealed), "{context}");
        assert!(self.setup.num_open_pages.is_none_or(|most| stats.peak_open_pages <= most), "{context}");
    }
}
