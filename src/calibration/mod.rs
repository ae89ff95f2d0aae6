//! Calibrations: statistics of a model's queries and keys that sealing uses to place rounding errors.
//!
//! A calibration belongs to a model, not to a cache. For each layer and key/value head it has the feedback matrices of
//! both frames and the mean and deviation of the K channels. A layer learns them from the first [`QUERY_TOKENS`] tokens
//! that it observes, or they are loaded from a file:
//!
//! | state of a layer | what sealing uses |
//! |---|---|
//! | [`State::No`] | nothing: codes are rounded to nearest |
//! | [`State::OwnPrompt`] | factors of the tokens observed before a seal, at least [`FIRST_TOKENS`]; factored again each time their number has doubled |
//! | [`State::Frozen`] | factors of the first [`QUERY_TOKENS`] |
//! | [`State::File`] | factors loaded from a file |
//!
//! The last two are final: no later traffic changes a byte of a tile. A layer is factored under its lock, so two caches
//! of a model that seal at the same time use the same factors.

mod file;
mod layer;
mod moments;
mod parallel;
mod write;

use crate::archive::{self, Source};
use crate::error::{Error, Result};
use crate::quant::LayerCalibration;
use layer::Layer;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

pub use file::KIND;

/// Query tokens after which a layer freezes.
pub const QUERY_TOKENS: usize = 2048;

/// Query tokens that a layer must have observed before it is factored.
pub const FIRST_TOKENS: usize = 128;

/// How far the calibration of a layer has advanced. A whole calibration has the state of its least advanced layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// Nothing is factored.
    No,
    /// Factored from the tokens observed before a seal, and to be factored again.
    OwnPrompt,
    /// Frozen after [`QUERY_TOKENS`] tokens, or by [`Calibration::freeze`].
    Frozen,
    /// Loaded from a file.
    File,
}

impl State {
    /// The name in every interface.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::No => "no",
            Self::OwnPrompt => "own prompt",
            Self::Frozen => "frozen",
            Self::File => "file",
        }
    }
}

/// The head counts of a layer. Each key/value head serves `num_q_heads / num_kv_heads` consecutive query heads, its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadShape {
    /// Query heads.
    pub num_q_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
}

/// A summary of one layer of a calibration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerSummary {
    /// The model's index of the layer.
    pub layer: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Query tokens observed; of a layer from a file, the fewest of all layers in it.
    pub query_tokens: usize,
    /// How far it has advanced.
    pub state: State,
    /// Heads whose loss scale (expected error of plain rounding, without the parts that both frames share) is smaller
    /// in the rotated frame; `None` before the layer is factored.
    pub rotated_heads: Option<usize>,
}

/// The model that a calibration file was made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// Identifies the model; how it is computed is up to the writer.
    pub fingerprint: String,
    /// The model's name, for display.
    pub model: String,
}

/// The calibration of one model, shared by all its caches. Keys are the model's layer indices.
#[derive(Debug, Default)]
pub struct Calibration {
    layers: RwLock<BTreeMap<usize, Arc<Mutex<Layer>>>>,
    origin: Option<Origin>,
}

fn lock(layer: &Mutex<Layer>) -> MutexGuard<'_, Layer> {
    // A panic under the lock is a bug that was already reported; a phase is replaced atomically, so the layer is valid.
    layer.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Calibration {
    /// An empty calibration, which learns.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn find(&self, layer: usize) -> Option<Arc<Mutex<Layer>>> {
        self.layers.read().unwrap_or_else(PoisonError::into_inner).get(&layer).map(Arc::clone)
    }

    fn all(&self) -> Vec<(usize, Arc<Mutex<Layer>>)> {
        let layers = self.layers.read().unwrap_or_else(PoisonError::into_inner);
        layers.iter().map(|(&layer, entry)| (layer, Arc::clone(entry))).collect()
    }

    /// Query tokens that a layer still needs: [`QUERY_TOKENS`] less those observed; 0 once it is frozen or loaded.
    #[must_use]
    pub fn wanted(&self, layer: usize) -> usize {
        self.find(layer).map_or(QUERY_TOKENS, |entry| lock(&entry).wanted())
    }

    /// Checks the shape of a layer against the one observed or loaded, if there is one.
    ///
    /// # Errors
    /// [`Error::Config`], naming both shapes.
    pub fn check(&self, layer: usize, num_kv_heads: usize, head_dim: usize) -> Result<()> {
        self.find(layer).map_or(Ok(()), |entry| lock(&entry).check(layer, num_kv_heads, head_dim))
    }

    /// Accumulates the first [`Calibration::wanted`] of the token rows q `[n, num_q_heads, head_dim]` and k
    /// `[n, num_kv_heads, head_dim]`, both after rotary embedding. Rows with a non-finite value are skipped. The last row
    /// needed freezes the layer.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Unsupported`], [`Error::Config`]: lengths that do not match the shape, or a layer that
    /// was observed or loaded with another `num_kv_heads` or `head_dim`. Nothing was accumulated.
    pub fn observe(&self, layer: usize, shape: HeadShape, q: &[f32], k: &[f32]) -> Result<()> {
        let num_rows = shape.num_rows(q, k)?;
        let entry = match self.find(layer) {
            Some(entry) => entry,
            None if num_rows == 0 => return Ok(()),
            None => {
                let mut layers = self.layers.write().unwrap_or_else(PoisonError::into_inner);
                Arc::clone(layers.entry(layer).or_insert_with(|| Arc::new(Mutex::new(Layer::new(shape)))))
            }
        };
        let mut entry = lock(&entry);
        entry.check(layer, shape.num_kv_heads, shape.head_dim)?;
        entry.observe(shape, q, k);
        Ok(())
    }

    /// The calibration to seal a layer's pages with; `None` before [`FIRST_TOKENS`] tokens were observed.
    ///
    /// Factors the layer on the first call after [`FIRST_TOKENS`] tokens, and again on the first call after the number of
    /// tokens has doubled. Other calls return the same `Arc`.
    ///
    /// # Errors
    /// None today: a head that cannot be factored has no feedback and is rounded to nearest.
    pub fn for_seal(&self, layer: usize) -> Result<Option<Arc<LayerCalibration>>> {
        Ok(self.find(layer).and_then(|entry| lock(&entry).for_seal()))
    }

    /// The factored or loaded calibration of a layer. Unlike [`Calibration::for_seal`], never factors.
    #[must_use]
    pub fn layer(&self, layer: usize) -> Option<Arc<LayerCalibration>> {
        self.find(layer).and_then(|entry| lock(&entry).ready())
    }

    /// Factors and freezes every layer with the tokens observed so far, to save a calibration made from a short text.
    ///
    /// # Errors
    /// [`Error::Config`], and no layer is frozen: no tokens were observed, or by some layer fewer than [`FIRST_TOKENS`].
    pub fn freeze(&self) -> Result<()> {
        let layers = self.all();
        if layers.is_empty() {
            return Err(Error::Config("there is nothing to freeze: no layer has seen a token".to_owned()));
        }
        for (layer, entry) in &layers {
            let query_tokens = lock(entry).query_tokens();
            if query_tokens < FIRST_TOKENS {
                return Err(Error::Config(format!(
                    "layer {layer} has seen {query_tokens} query tokens, {FIRST_TOKENS} are the fewest to freeze with"
                )));
            }
        }
        layers.iter().for_each(|(_, entry)| lock(entry).freeze());
        Ok(())
    }

    /// The state of the least advanced layer; [`State::No`] without layers.
    #[must_use]
    pub fn state(&self) -> State {
        self.all().iter().map(|(_, entry)| lock(entry).state()).min().unwrap_or(State::No)
    }

    /// Every layer observed or loaded, by ascending index.
    #[must_use]
    pub fn layers(&self) -> Vec<LayerSummary> {
        let summary = |(layer, entry): &(usize, Arc<Mutex<Layer>>)| {
            let entry = lock(entry);
            LayerSummary {
                layer: *layer,
                num_kv_heads: entry.num_kv_heads,
                head_dim: entry.head_dim,
                query_tokens: entry.query_tokens(),
                state: entry.state(),
                rotated_heads: entry.ready().map(|ready| ready.rotated_heads()),
            }
        };
        self.all().iter().map(summary).collect()
    }

    /// What rank `rank` of `num_ranks` of tensor parallelism needs: consecutive key/value heads of each layer, as many on
    /// each rank; where a layer has fewer heads than there are ranks, one that as many ranks share.
    ///
    /// # Errors
    /// [`Error::Config`]: `rank` is not below `num_ranks`, a layer still learns, or its heads and the ranks do not divide.
    pub fn shard(&self, rank: usize, num_ranks: usize) -> Result<Self> {
        if rank >= num_ranks {
            return Err(Error::Config(format!("rank {rank} of {num_ranks}: ranks are numbered from 0")));
        }
        let part = |(layer, entry): (usize, Arc<Mutex<Layer>>)| {
            let part = lock(&entry).shard(layer, rank, num_ranks)?;
            Ok((layer, Arc::new(Mutex::new(part))))
        };
        let layers: Result<_> = self.all().into_iter().map(part).collect();
        Ok(Self { layers: RwLock::new(layers?), origin: self.origin.clone() })
    }

    /// The model named by the file that this calibration was loaded from; `None` if it was not loaded.
    #[must_use]
    pub fn origin(&self) -> Option<&Origin> {
        self.origin.as_ref()
    }

    /// The frozen layers as a file for [`Calibration::from_bytes`]. Deterministic.
    ///
    /// # Errors
    /// [`Error::Config`]: no layer is frozen.
    pub fn to_bytes(&self, fingerprint: &str, model: &str) -> Result<Vec<u8>> {
        let (frozen, query_tokens) = self.frozen()?;
        archive::to_bytes(&write::contents(&frozen, query_tokens, fingerprint, model))
    }

    /// Writes the frozen layers to a file, atomically. See [`Calibration::to_bytes`].
    ///
    /// # Errors
    /// [`Error::Config`]: no layer is frozen. [`Error::Calibration`]: the file cannot be written.
    pub fn save(&self, path: &Path, fingerprint: &str, model: &str) -> Result<()> {
        let (frozen, query_tokens) = self.frozen()?;
        archive::save(path, &write::contents(&frozen, query_tokens, fingerprint, model))
    }

    /// The frozen layers, and the fewest query tokens that one of them observed.
    fn frozen(&self) -> Result<(Box<write::Layers>, usize)> {
        let mut query_tokens = usize::MAX;
        let mut frozen = Vec::new();
        for (layer, entry) in self.all() {
            let entry = lock(&entry);
            if let Some(ready) = entry.frozen() {
                query_tokens = query_tokens.min(entry.query_tokens());
                frozen.push((layer, ready));
            }
        }
        if frozen.is_empty() {
            return Err(Error::Config(format!(
                "no layer is frozen: a calibration can be saved after {QUERY_TOKENS} query tokens, or after `freeze`"
            )));
        }
        Ok((frozen.into(), query_tokens))
    }

    /// Reads a calibration from a file's bytes; every layer is [`State::File`].
    ///
    /// # Errors
    /// [`Error::Calibration`]: not a calibration file, damaged, of another version, or of a model with another
    /// fingerprint than `fingerprint`, where that is given.
    pub fn from_bytes(bytes: &[u8], fingerprint: Option<&str>) -> Result<Self> {
        Self::read(&bytes, fingerprint)
    }

    /// Reads a calibration from a file. See [`Calibration::from_bytes`].
    ///
    /// # Errors
    /// [`Error::Calibration`], naming the file.
    pub fn load(path: &Path, fingerprint: Option<&str>) -> Result<Self> {
        let file = archive::open(path, &KIND)?;
        Self::read(&file, fingerprint).map_err(|error| KIND.named(path, &error.to_string()))
    }

    fn read(source: &dyn Source, fingerprint: Option<&str>) -> Result<Self> {
        let (origin, layers) = file::read(source, fingerprint)?;
        let layers = layers.into_iter().map(|(layer, entry)| (layer, Arc::new(Mutex::new(entry)))).collect();
        Ok(Self { layers: RwLock::new(layers), origin: Some(origin) })
    }
}
