//! Keeps one netns from filling what all use: the maps that record connections under way, in which each may have `SHARE` entries
//! in each direction, and the ring buffer EVENTS.
//!
//! Only the programs insert and remove these entries. Of several that remove an entry, one succeeds, and that one reduces the
//! count, so the counts are exact.

use core::{
    arch::asm,
    ptr::{read_volatile, write_volatile},
};

use auth_common::{Closed, EVENT_BYTES, SHARE, Unread, Usage};
use aya_ebpf::{
    bindings::{BPF_EXIST, BPF_NOEXIST, BPF_RB_AVAIL_DATA, BPF_RB_CONS_POS, BPF_RB_PROD_POS},
    btf_maps::HashMap,
    helpers::generated::bpf_ringbuf_query,
};

use crate::maps::{EVENTS, SHARES, UNREAD};

/// What the netns uses of its share of PENDING and ADMITTED. `None` if it is not enrolled.
#[inline(always)]
pub fn connects(cookie: u64) -> Option<*mut Usage> {
    // SAFETY: the pointer is to an entry of the map, which is freed after a grace period.
    SHARES
        .get_ptr_mut(cookie)
        .map(|share| unsafe { &raw mut (*share).connects })
}

/// What the netns uses of its share of DELIVERIES. `None` if it is neither enrolled nor the node's.
#[inline(always)]
pub fn deliveries(cookie: u64) -> Option<*mut Usage> {
    // SAFETY: as in `connects`.
    SHARES
        .get_ptr_mut(cookie)
        .map(|share| unsafe { &raw mut (*share).deliveries })
}

/// Whether there may be another entry. Counts the refusal if not.
#[inline(always)]
pub fn admits(usage: Option<*mut Usage>) -> bool {
    let Some(usage) = usage else {
        return false;
    };
    // SAFETY: the pointer is to an entry of the map.
    unsafe {
        if read_volatile(&raw const (*usage).entries) < i64::from(SHARE) {
            return true;
        }
        add((&raw mut (*usage).refused).cast(), 1);
    }
    false
}

/// Enters a connection in `map`. Returns whether it has an entry now: it has none if the share is used up, the map is full
/// or memory is short.
#[inline(always)]
pub fn insert<K, V, const MAX: usize, const FLAGS: usize>(
    usage: Option<*mut Usage>,
    map: &HashMap<K, V, MAX, FLAGS>,
    key: &K,
    value: &V,
) -> bool {
    let Some(usage) = usage.filter(|usage| admits(Some(*usage))) else {
        return false;
    };
    if map.insert(key, value, BPF_NOEXIST.into()).is_ok() {
        // SAFETY: the pointer is to an entry of the map.
        unsafe { add(&raw mut (*usage).entries, 1) };
        return true;
    }
    // During a takeover the programs of both daemons run, and the other one may have been first.
    map.insert(key, value, BPF_EXIST.into()).is_ok()
}

/// Removes a connection from `map`. Returns whether it had an entry.
#[inline(always)]
pub fn remove<K, V, const MAX: usize, const FLAGS: usize>(
    usage: impl FnOnce() -> Option<*mut Usage>,
    map: &HashMap<K, V, MAX, FLAGS>,
    key: &K,
) -> bool {
    if map.remove(key).is_err() {
        return false;
    }
    if let Some(usage) = usage() {
        // SAFETY: the pointer is to an entry of the map.
        unsafe { add(&raw mut (*usage).entries, -1) };
    }
    true
}

/// Whether the client in the netns with `cookie` may have another event in EVENTS: its unread ones must take less room than is
/// free, so one pod leaves half of the ring to the others, and two a third. Counts the event that is left out if not.
#[inline(always)]
pub fn admits_event(cookie: u64) -> bool {
    let Some(unread) = UNREAD.get_ptr_mut(cookie) else {
        let first = Unread {
            events: 1,
            until: ring(BPF_RB_PROD_POS) + 1,
            lost: 0,
        };
        return UNREAD.insert(cookie, first, 0).is_ok();
    };
    let free = u64::from(EVENT_BYTES).saturating_sub(ring(BPF_RB_AVAIL_DATA));
    // SAFETY: the pointer is to an entry of the map. Programs on other CPUs may count events of the same pod at the same time:
    // then the count is off by some until the daemon has read all of them.
    unsafe {
        let until = read_volatile(&raw const (*unread).until);
        if ring(BPF_RB_CONS_POS) >= until {
            write_volatile(&raw mut (*unread).events, 0);
        }
        let events = read_volatile(&raw const (*unread).events) as u64;
        if events * size_of::<Closed>() as u64 >= free {
            add((&raw mut (*unread).lost).cast(), 1);
            return false;
        }
        add(&raw mut (*unread).events, 1);
        // The event begins here or, if other programs write at the same time, behind.
        write_volatile(&raw mut (*unread).until, ring(BPF_RB_PROD_POS) + 1);
    }
    true
}

/// What EVENTS holds, or a position in it, by the helper's flag.
#[inline(always)]
fn ring(what: u32) -> u64 {
    let map = core::ptr::from_ref(&EVENTS).cast_mut();
    // SAFETY: the helper only reads the ring's counters.
    unsafe { bpf_ringbuf_query(map.cast(), what.into()) }
}

/// Adds to a number that programs on other CPUs change too. This is BPF_ATOMIC with BPF_ADD (RFC 9669 §5.3), which every
/// kernel has. `core` has no atomic additions for this target.
///
/// # Safety
///
/// `number` must point to a field of an entry of a map.
#[inline(always)]
unsafe fn add(number: *mut i64, summand: i64) {
    // SAFETY: the caller passes a valid pointer, and the instruction changes nothing else.
    unsafe {
        asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) number, in(reg) summand, options(nostack))
    };
}
