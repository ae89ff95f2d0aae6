//! Which process has the kernel threads.

use crate::{Error, Result};
use std::sync::OnceLock;

/// The id of the process whose kernel threads exist: the one that first called this, which every use of them does.
pub(super) fn kernel_process() -> u32 {
    static FIRST: OnceLock<u32> = OnceLock::new();
    *FIRST.get_or_init(std::process::id)
}

/// Refuses a forked child: kernel threads do not survive `fork`, and a child that used them would block forever.
pub(super) fn check_process() -> Result<()> {
    let (parent, current) = (kernel_process(), std::process::id());
    if parent == current {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "process {current} was forked from {parent}, whose kernel threads it does not have: start processes by \"spawn\""
    )))
}
