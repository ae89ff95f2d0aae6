//! What does sealing know of a model's queries, and from when on?
//!
//! A calibration belongs to a model, not to a cache: per layer and key/value head the feedback matrices of both frames
//! and the mean and deviation of the K channels. Each layer learns them from the first [`QUERY_TOKENS`] tokens that it
//! sees, or they come from a file:
//!
//! | state of a layer | what sealing gets |
//! |---|---|
//! | [`State::No`] | nothing: plain rounding |
//! | [`State::OwnPrompt`] | what the tokens before the first seal said, at least [`FIRST_TOKENS`]; anew when they have doubled |
//! | [`State::Frozen`] | what the first [`QUERY_TOKENS`] said |
//! | [`State::File`] | what a file says |
//!
//! The last two never change: no later traffic can change a byte of a tile. A layer's lock is held while it factors, so
//! two caches of a model that seal at the same time use the same.

mod file;
mod layer;
mod moments;
mod parallel;
mod write;

use crate::archive::{self, Source};
use crate::error::{Error, Result};
use crate::quant::HeadCalibration;
use layer::Layer;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

pub use file::KIND;

/// Query tokens after which a layer freezes.
pub const QUERY_TOKENS: usize = 2048;

/// Query tokens that a layer must have seen before anything is factored.
pub const FIRST_TOKENS: usize = 128;

/// How far a layer has come; of a calibration, its least layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// Nothing is factored.
    No,
    /// Factored from what came before a seal; it will be factored again.
    OwnPrompt,
    /// Frozen after [`QUERY_TOKENS`] tokens, or by [`Calibration::freeze`].
    Frozen,
    /// Out of a file.
    File,
}

impl State {
    /// The name used in every interface.
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

/// The heads of a layer. Each key/value head serves `num_q_heads / num_kv_heads` consecutive query heads, its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadShape {
    /// Query heads.
    pub num_q_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
}

/// What sealing a page of one layer uses.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerCalibration {
    /// Of each key/value head, in order.
    pub heads: Vec<HeadCalibration>,
}

/// What is known of a layer of a calibration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerSummary {
    /// The model's index of the layer.
    pub layer: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Query tokens seen; out of a file, those of the layer that had seen the fewest.
    pub query_tokens: usize,
    /// How far it has come.
    pub state: State,
    /// Heads whose loss scale (expected error of plain rounding, without the parts that both frames share) is smaller
    /// in the rotated frame; `None` before anything is factored.
    pub rotated_heads: Option<usize>,
}

/// What a file says of the model that it was made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// Identifies the model; what it is made of is the writer's business.
    pub fingerprint: String,
    /// The model's name, for people.
    pub model: String,
}

/// The calibration of one model, shared by all its caches. Keys are the model's layer indices.
#[derive(Debug, Default)]
pub struct Calibration {
    layers: RwLock<BTreeMap<usize, Arc<Mutex<Layer>>>>,
    origin: Option<Origin>,
}

fn lock(layer: &Mutex<Layer>) -> MutexGuard<'_, Layer> {
    // A panic under the lock is a bug; it has been reported, and a phase is replaced as a whole or not at all.
    layer.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Calibration {
    /// One that knows nothing yet.
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

    /// Query tokens that a layer would still take: [`QUERY_TOKENS`] less those seen; 0 once it is frozen or loaded.
    #[must_use]
    pub fn wanted(&self, layer: usize) -> usize {
        self.find(layer).map_or(QUERY_TOKENS, |entry| lock(&entry).wanted())
    }

    /// Does a layer that is known have this shape? One that is not yet known may have any.
    ///
    /// # Errors
    /// [`Error::Config`] naming both shapes.
    pub fn check(&self, layer: usize, num_kv_heads: usize, head_dim: usize) -> Result<()> {
        self.find(layer).map_or(Ok(()), |entry| lock(&entry).check(layer, num_kv_heads, head_dim))
    }

    /// Takes the first [`Calibration::wanted`] of the token rows q `[n, num_q_heads, head_dim]` and k
    /// `[n, num_kv_heads, head_dim]`, in the order of submission and after their position was rotated in. Rows with a
    /// number that is not finite are passed over. The last row wanted freezes the layer.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Unsupported`], [`Error::Config`]: lengths and shape that do not fit each other, or
    /// a layer that was seen before, or loaded, with another `num_kv_heads` or `head_dim`. Nothing was taken.
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

    /// What a page of a layer that is about to seal uses. The first call that finds [`FIRST_TOKENS`] seen factors them, and
    /// a later one that finds twice as many as were factored last; in between, and once the layer is frozen, the answer
    /// stays the same, to the pointer. `None` before.
    ///
    /// # Errors
    /// None today: a head that cannot be factored has no feedback, and rounds plainly.
    pub fn for_seal(&self, layer: usize) -> Result<Option<Arc<LayerCalibration>>> {
        Ok(self.find(layer).and_then(|entry| lock(&entry).for_seal()))
    }

    /// What is factored or loaded of a layer; never factors.
    #[must_use]
    pub fn layer(&self, layer: usize) -> Option<Arc<LayerCalibration>> {
        self.find(layer).and_then(|entry| lock(&entry).ready())
    }

    /// Factors and freezes every layer with what it has seen: for a file from a short text.
    ///
    /// # Errors
    /// [`Error::Config`], and no layer is frozen: nothing was seen, or a layer has seen fewer than [`FIRST_TOKENS`].
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

    /// The least state of its layers; [`State::No`] without any.
    #[must_use]
    pub fn state(&self) -> State {
        self.all().iter().map(|(_, entry)| lock(entry).state()).min().unwrap_or(State::No)
    }

    /// Every layer that was seen or loaded, in order.
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

    /// What the file that this came from says of its model; `None` if it came from none.
    #[must_use]
    pub fn origin(&self) -> Option<&Origin> {
        self.origin.as_ref()
    }

    /// The frozen layers as a file, for [`Calibration::from_bytes`]: the same bytes for the same layers.
    ///
    /// # Errors
    /// [`Error::Config`]: no layer is frozen.
    pub fn to_bytes(&self, fingerprint: &str, model: &str) -> Result<Vec<u8>> {
        let (frozen, query_tokens) = self.frozen()?;
        archive::to_bytes(&write::contents(&frozen, query_tokens, fingerprint, model))
    }

    /// Writes the frozen layers to a file, whole or not at all. See [`Calibration::to_bytes`].
    ///
    /// # Errors
    /// [`Error::Config`]: no layer is frozen. [`Error::Calibration`]: the file cannot be written.
    pub fn save(&self, path: &Path, fingerprint: &str, model: &str) -> Result<()> {
        let (frozen, query_tokens) = self.frozen()?;
        archive::save(path, &write::contents(&frozen, query_tokens, fingerprint, model))
    }

    /// The frozen layers, and the query tokens that the one which saw the fewest has seen.
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
                "no layer is frozen: a calibration is kept once it has seen {QUERY_TOKENS} query tokens, or is frozen"
            )));
        }
        Ok((frozen.into(), query_tokens))
    }

    /// The calibration in a file's bytes; every layer is [`State::File`].
    ///
    /// # Errors
    /// [`Error::Calibration`], with the numbers: not such a file, damaged, of another version, or, where a
    /// `fingerprint` is given, of another model.
    pub fn from_bytes(bytes: &[u8], fingerprint: Option<&str>) -> Result<Self> {
        Self::read(&bytes, fingerprint)
    }

    /// The calibration in a file. See [`Calibration::from_bytes`].
    ///
    /// # Errors
    /// [`Error::Calibration`], which names the file.
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

impl LayerCalibration {
    fn rotated_heads(&self) -> usize {
        self.heads.iter().filter(|head| head.feedback.rotated.loss_scale < head.feedback.plain.loss_scale).count()
    }
}
