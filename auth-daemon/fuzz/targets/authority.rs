//! The `:authority` of a CONNECT: never a panic, and what is read is written in one way only.

use auth_tunnel::hbone::parse_authority;

pub(super) fn run(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let Ok(destination) = parse_authority(text) else {
        return;
    };
    assert_ne!(destination.port(), 0);
    assert_eq!(destination.ip(), destination.ip().to_canonical());
    assert_eq!(parse_authority(&destination.to_string()), Ok(destination));
}
