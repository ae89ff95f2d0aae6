//! The environment variables that the library reads, all of them.

/// `KVARN_SIMD`: the SIMD level to use in place of the fastest one, by name. Bytes that are no text are no level's name,
/// and are handed on as such.
#[must_use]
pub fn simd() -> Option<String> {
    let value = std::env::var_os("KVARN_SIMD").filter(|value| !value.is_empty())?;
    Some(value.to_string_lossy().into_owned())
}
