//! The environment variables that the library reads, all of them.

/// `KVARN_SIMD`: the SIMD level to use in place of the fastest one, by name.
#[must_use]
pub fn simd() -> Option<String> {
    std::env::var("KVARN_SIMD").ok().filter(|value| !value.is_empty())
}
