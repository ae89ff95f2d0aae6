//! The layers of the crate.

/// The top-level modules, lowest first, and what each may import besides itself. An entry with `::` opens one name of
/// a module and not the rest of it.
pub const LAYERS: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("format", &[]),
    ("config", &["error", "format"]),
    ("archive", &["error"]),
    ("quant", &["error", "format"]),
    ("paging", &["error"]),
    ("plan", &["error", "format", "paging"]),
    (
        "backend",
        &[
            "error",
            "format",
            "config",
            "quant",
            "plan",
            "paging::ids",
            "paging::BlockId",
            "paging::PageId",
            "paging::UsedBlock",
            "paging::Place",
            "paging::PlaceKind",
        ],
    ),
    ("calibration", &["error", "format", "config", "archive", "quant"]),
    (
        "engine",
        &[
            "error",
            "format",
            "config",
            "plan",
            "backend",
            "calibration",
            "paging::BlockId",
            "paging::PageId",
            "paging::Place",
            "paging::Places",
            "paging::UsedBlock",
        ],
    ),
    ("cache", &["error", "format", "config", "archive", "quant", "paging", "plan", "backend", "calibration", "engine"]),
    ("scheduler", &["error", "config", "paging", "plan"]),
    (
        "py",
        &[
            "error",
            "format",
            "config",
            "quant",
            "paging",
            "plan",
            "backend",
            "cache",
            "scheduler",
            "calibration",
            "engine",
        ],
    ),
];
