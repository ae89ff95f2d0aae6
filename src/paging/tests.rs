use super::*;

fn append(paging: &mut Paging, sequence: SequenceId, num_new: usize, keep_from: usize) {
    paging.room(&[StepRequest { sequence, num_new, keep_from, sealed_to: 0 }]).map(Room::begin).unwrap();
    paging.commit(&[sequence]).unwrap();
}

fn blocks(paging: &Paging, id: SequenceId) -> Vec<u32> {
    paging.sequence(id).unwrap().blocks().iter().map(|block| block.0).collect()
}

/// A rollback after which a query sees `window` tokens.
fn to(sequence: SequenceId, len: usize, window: Option<usize>) -> Rollback {
    Rollback { sequence, len, first_seen: window.map_or(0, |window| (len + 1).saturating_sub(window)) }
}

#[test]
fn a_pool_that_cannot_be_is_refused() {
    assert!(matches!(Paging::new(0, None, b""), Err(Error::InvalidSetting { name: "block_size", .. })));
    assert!(matches!(Paging::new(1, Some(usize::MAX), b""), Err(Error::InvalidSetting { name: "num_blocks", .. })));
    assert_eq!(Paging::new(16, Some((1 << 27) - 1), b"").unwrap().num_blocks(), (1 << 27) - 1);
}

#[test]
fn a_match_shares_published_full_blocks_and_leaves_a_query() {
    let mut paging = Paging::new(2, None, b"salt").unwrap();
    let a = paging.new_sequence();
    append(&mut paging, a, 5, 0);
    let ids = [1, 2, 3, 4, 5];
    assert_eq!(paging.publish_prefix(a, &ids), Ok(2));
    assert_eq!(paging.publish_prefix(a, &ids), Ok(0));
    for (prompt, num_matched) in [(&ids[..], 2), (&[1, 2, 3, 4], 1), (&[1, 2, 9, 4, 5], 1), (&[9, 2, 3, 4, 5], 0)] {
        let b = paging.match_prefix(prompt);
        assert_eq!(blocks(&paging, b), blocks(&paging, a)[..num_matched]);
        assert_eq!(paging.sequence(b).unwrap().len(), 2 * num_matched);
    }
    let none = paging.match_prefix(&[]);
    assert!(paging.sequence(none).unwrap().is_empty());
    paging.check().unwrap();
}

#[test]
fn publishing_needs_the_id_of_every_committed_token() {
    let mut paging = Paging::new(2, None, b"").unwrap();
    let a = paging.new_sequence();
    append(&mut paging, a, 4, 0);
    let Err(Error::Config(message)) = paging.publish_prefix(a, &[1, 2, 3]) else { panic!("accepted") };
    assert!(message.contains('4') && message.contains('3'), "{message}");
}

#[test]
fn free_prefixes_are_revived_until_they_are_reused_tail_first() {
    let mut paging = Paging::new(1, Some(3), b"").unwrap();
    let ids = [1, 2, 3, 4];
    let a = paging.new_sequence();
    append(&mut paging, a, 3, 0);
    paging.publish_prefix(a, &ids).unwrap();
    paging.free(a).unwrap();
    assert_eq!((paging.num_free(), paging.blocks_in_use()), (Some(3), 0));
    let b = paging.match_prefix(&ids);
    assert_eq!((paging.sequence(b).unwrap().len(), paging.num_free()), (3, Some(0)));
    paging.free(b).unwrap();
    let c = paging.new_sequence();
    append(&mut paging, c, 1, 0);
    let d = paging.match_prefix(&ids);
    assert_eq!(paging.sequence(d).unwrap().len(), 2);
    paging.check().unwrap();
}

#[test]
fn a_published_block_that_is_written_again_is_no_longer_found() {
    let mut paging = Paging::new(2, None, b"").unwrap();
    let a = paging.new_sequence();
    append(&mut paging, a, 4, 0);
    paging.publish_prefix(a, &[1, 2, 3, 4]).unwrap();
    paging.truncate(to(a, 3, None)).unwrap();
    append(&mut paging, a, 1, 0);
    let b = paging.match_prefix(&[1, 2, 3, 4, 5]);
    assert_eq!(paging.sequence(b).unwrap().len(), 2);
    assert_eq!(paging.cow_copies(), 0);
    assert_eq!(paging.publish_prefix(a, &[1, 2, 3, 9]), Ok(1));
}

#[test]
fn a_published_block_that_is_shared_is_copied_and_stays_found() {
    let mut paging = Paging::new(2, None, b"").unwrap();
    let a = paging.new_sequence();
    append(&mut paging, a, 4, 0);
    paging.publish_prefix(a, &[1, 2, 3, 4]).unwrap();
    let b = paging.match_prefix(&[1, 2, 3, 4, 5]);
    paging.truncate(to(b, 3, None)).unwrap();
    append(&mut paging, b, 1, 0);
    assert_eq!(paging.cow_copies(), 1);
    let c = paging.match_prefix(&[1, 2, 3, 4, 5]);
    assert_eq!(blocks(&paging, c), blocks(&paging, a));
}

#[test]
fn a_rollback_needs_the_tokens_that_the_next_query_sees() {
    let mut paging = Paging::new(2, None, b"").unwrap();
    let a = paging.new_sequence();
    append(&mut paging, a, 8, 0);
    append(&mut paging, a, 1, 4);
    let too_far = |requested| Err(Error::RollbackTooFar { id: a.0, requested, floor: 4, len: 9 });
    assert_eq!(paging.truncate(to(a, 10, Some(3))), too_far(10));
    assert_eq!(paging.truncate(to(a, 5, Some(3))), too_far(5));
    assert_eq!(paging.truncate(to(a, 3, Some(0))), too_far(3));
    assert_eq!(paging.truncate(to(a, 8, None)), too_far(8));
    assert_eq!(paging.truncate(to(a, 9, None)), Ok(()));
    assert_eq!(paging.truncate(to(a, 6, Some(3))), Ok(()));
    assert_eq!(blocks(&paging, a).len(), 3);
    assert_eq!(paging.publish_prefix(a, &[0; 6]), Ok(0));
    paging.check().unwrap();
}

#[test]
fn a_partial_block_of_two_sequences_counts_once() {
    let mut paging = Paging::new(2, None, b"").unwrap();
    let (a, b) = (paging.new_sequence(), paging.new_sequence());
    append(&mut paging, a, 3, 0);
    append(&mut paging, b, 2, 0);
    paging.fork(a).unwrap();
    assert_eq!((paging.partial_blocks(), paging.num_sequences()), (1, 3));
}

#[test]
fn a_freed_sequence_is_unknown() {
    let mut paging = Paging::new(2, None, b"").unwrap();
    let a = paging.new_sequence();
    paging.free(a).unwrap();
    assert_eq!(paging.free(a), Err(Error::UnknownSequence { id: a.0 }));
    assert_ne!(paging.new_sequence(), a);
}

#[test]
fn clearing_forgets_open_steps_and_prefixes_and_reuses_no_id() {
    let mut paging = Paging::new(1, Some(4), b"").unwrap();
    let a = paging.new_sequence();
    append(&mut paging, a, 2, 0);
    paging.publish_prefix(a, &[1, 2]).unwrap();
    let step = StepRequest { sequence: a, num_new: 1, keep_from: 0, sealed_to: 0 };
    paging.room(&[step]).map(Room::begin).unwrap();
    paging.clear();
    let b = paging.match_prefix(&[1, 2, 3]);
    assert!(b > a && paging.sequence(b).unwrap().is_empty());
    assert_eq!((paging.num_sequences(), paging.num_free(), paging.check()), (1, Some(4), Ok(())));
}
