//! Any bytes as an archive: its header is read or refused, and of one that is read every tensor lies within the file.

#![no_main]

use kvarn::archive::{Archive, Element, Source};
use kvarn::cache::file::KIND;
use kvarn::error::{Error, Result};
use libfuzzer_sys::fuzz_target;

const ELEMENTS: [Element; 5] = [Element::U8, Element::U16, Element::U32, Element::U64, Element::F32];

fuzz_target!(|data: &[u8]| {
    read(data);
    if let Some(file) = kvarn_fuzz::repaired(data) {
        read(&file);
    }
});

fn read(file: &[u8]) {
    let source: &dyn Source = &file;
    let archive = match Archive::read(source, &KIND) {
        Ok(archive) => archive,
        Err(error) => return is_typed(error),
    };
    let _ = refused(archive.number("format_version"));
    let mut total = 0;
    for name in archive.names() {
        let found: Vec<_> = ELEMENTS.into_iter().filter_map(|element| Some((element, refused(archive.tensor(&name, element))?))).collect();
        assert!(found.len() <= 1, "{name} is of one type");
        for (element, tensor) in found {
            let bytes = tensor.read().expect("a tensor within the file");
            assert_eq!(bytes.len(), tensor.shape().iter().product::<usize>() * element.bytes(), "{name}");
            assert!(file.windows(bytes.len().max(1)).any(|window| bytes.is_empty() || window == bytes), "{name}");
            assert!(refused(tensor.read_at(bytes.len(), &mut [0])).is_none(), "{name}: past its end");
            assert!(refused(tensor.read_at(usize::MAX, &mut [0])).is_none(), "{name}: far past its end");
            assert!(refused(archive.shaped(&name, element, tensor.shape())).is_some(), "{name}: its own shape");
            total += bytes.len();
        }
    }
    assert!(total <= file.len(), "tensors of {total} bytes in a file of {}", file.len());
}

fn refused<T>(result: Result<T>) -> Option<T> {
    result.map_err(is_typed).ok()
}

fn is_typed(error: Error) {
    assert!(matches!(error, Error::CacheFile(_)), "{error:?}");
}
