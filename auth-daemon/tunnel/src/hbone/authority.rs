//! The `:authority` of a CONNECT, which names the destination.

use std::net::SocketAddr;

/// Why an `:authority` names no destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAuthority {
    /// The request has none.
    #[error("the CONNECT has no :authority")]
    Missing,
    /// It is not an address and a port. A host name is not resolved: it would not prove which pod is meant.
    #[error("the :authority is not an IP address and a port")]
    NoAddress,
    /// The port is zero.
    #[error("the port of the :authority is zero")]
    NoPort,
}

/// Parses an address and a port (RFC 9110 §9.3.6): `10.0.0.1:80` or `[2001:db8::1]:80`. An IPv4-mapped IPv6 address becomes
/// IPv4. An IPv6 address has no zone.
pub fn parse(authority: &str) -> Result<SocketAddr, InvalidAuthority> {
    let address: SocketAddr = authority.parse().map_err(|_| InvalidAuthority::NoAddress)?;
    if matches!(address, SocketAddr::V6(_)) && authority.contains('%') {
        return Err(InvalidAuthority::NoAddress);
    }
    if address.port() == 0 {
        return Err(InvalidAuthority::NoPort);
    }
    Ok(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn is_an_address_and_a_port() {
        let read = |text| parse(text).map(|address| address.to_string());
        assert_eq!(read("10.0.0.1:80"), Ok("10.0.0.1:80".into()));
        assert_eq!(read("[2001:db8::1]:443"), Ok("[2001:db8::1]:443".into()));
        assert_eq!(read("[::ffff:10.0.0.1]:80"), Ok("10.0.0.1:80".into()));
        assert_eq!(read("10.0.0.1:0"), Err(InvalidAuthority::NoPort));
        for text in [
            "",
            ":80",
            "10.0.0.1",
            "10.0.0.1:",
            "10.0.0.1:65536",
            "10.0.0.01:80",
            "user@10.0.0.1:80",
            "10.0.0.1:80/",
            "2001:db8::1:80",
            "[fe80::1%3]:80",
            "web.default.svc.cluster.local:80",
        ] {
            assert_eq!(read(text), Err(InvalidAuthority::NoAddress), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_address_is_read_as_it_is_written(ip: std::net::IpAddr, port in 1..=u16::MAX) {
            let address = SocketAddr::new(ip.to_canonical(), port);
            prop_assert_eq!(parse(&address.to_string()), Ok(address));
        }

        #[test]
        fn any_text_is_an_address_or_an_error(text: String) {
            if let Ok(address) = parse(&text) {
                prop_assert_eq!(parse(&address.to_string()), Ok(address));
            }
        }
    }
}
