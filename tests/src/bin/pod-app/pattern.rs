//! Byte patterns that are fast to generate and verify, and differ from stream to stream.

use std::io::{self, Read, Write};

/// Sends `length` bytes of the pattern of `seed`.
pub(crate) fn send(mut to: impl Write, seed: u64, length: u64) -> io::Result<()> {
    let mut pattern = Pattern::new(seed);
    let mut chunk = vec![0; CHUNK];
    let mut left = length;
    while left > 0 {
        let part = &mut chunk[..left.min(CHUNK as u64) as usize];
        pattern.fill(part);
        to.write_all(part)?;
        left -= part.len() as u64;
    }
    Ok(())
}

/// Receives `length` bytes and compares each with the pattern of `seed`. Calls `after_chunk` with the number of bytes
/// received so far.
pub(crate) fn receive(
    mut from: impl Read,
    seed: u64,
    length: u64,
    mut after_chunk: impl FnMut(u64),
) -> io::Result<()> {
    let mut pattern = Pattern::new(seed);
    let (mut chunk, mut expected) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut received = 0;
    while received < length {
        let size = (length - received).min(CHUNK as u64) as usize;
        from.read_exact(&mut chunk[..size])?;
        pattern.fill(&mut expected[..size]);
        if chunk[..size] != expected[..size] {
            let message = format!("the bytes from {received} on differ from what was sent");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        received += size as u64;
        after_chunk(received);
    }
    Ok(())
}

/// The header that a sender sends first: the seed and the length.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header {
    pub(crate) seed: u64,
    pub(crate) length: u64,
}

impl Header {
    pub(crate) fn write(self, mut to: impl Write) -> io::Result<()> {
        to.write_all(&[self.seed.to_be_bytes(), self.length.to_be_bytes()].concat())
    }

    pub(crate) fn read(mut from: impl Read) -> io::Result<Self> {
        let (mut seed, mut length) = ([0; 8], [0; 8]);
        from.read_exact(&mut seed)?;
        from.read_exact(&mut length)?;
        Ok(Self {
            seed: u64::from_be_bytes(seed),
            length: u64::from_be_bytes(length),
        })
    }
}

/// Returns an error if the peer sends more than it announced, which means that streams were mixed up.
pub(crate) fn expect_end(mut from: impl Read) -> io::Result<()> {
    match from.read(&mut [0; 1])? {
        0 => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "more bytes came than were announced",
        )),
    }
}

/// Marsaglia's xorshift with 64 bits of state and the shifts 13, 7 and 17.
struct Pattern(u64);

impl Pattern {
    fn new(seed: u64) -> Self {
        // Zero would stay zero, and neighbouring seeds should differ in more than one bit.
        Self((seed ^ 0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        let mut state = self.0;
        for word in bytes.chunks_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
        }
        self.0 = state;
    }
}

/// Bytes; a multiple of 8, so that both sides cut the pattern at the same places.
const CHUNK: usize = 256 * 1024;
