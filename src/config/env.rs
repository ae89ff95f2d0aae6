//! The environment variables that the library reads.

/// `KVARN_SIMD`: the name of the SIMD level to use instead of the fastest one. A value that is not UTF-8 is returned with
/// replacement characters, so that it fails like any other unknown level.
#[must_use]
pub fn simd() -> Option<String> {
    let value = std::env::var_os("KVARN_SIMD").filter(|value| !value.is_empty())?;
    Some(value.to_string_lossy().into_owned())
}
