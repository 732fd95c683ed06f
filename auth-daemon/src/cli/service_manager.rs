//! Tells the service manager that has started the daemon (systemd, `Type=notify`) how far it is: sd_notify(3).

use std::{
    env,
    ffi::OsStr,
    io,
    os::{
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::Duration,
};

/// Variable with the address of the service manager's socket.
const SOCKET: &str = "NOTIFY_SOCKET";
/// How long the service manager may take to make room for a message.
const TIMEOUT: Duration = Duration::from_secs(1);

/// The service manager, if there is one that wants to know.
#[derive(Clone, Debug)]
pub(super) struct ServiceManager(Option<SocketAddr>);

impl ServiceManager {
    /// The one whose socket `$NOTIFY_SOCKET` names.
    pub(super) fn of_environment() -> Self {
        let Some(name) = env::var_os(SOCKET) else {
            return Self(None);
        };
        match address(&name) {
            Ok(address) => Self(Some(address)),
            Err(error) => {
                tracing::warn!(?name, %error, "${SOCKET} is no socket's address");
                Self(None)
            }
        }
    }

    /// Reports that the daemon serves its node.
    pub(super) fn ready(&self) {
        self.tell("READY=1");
    }

    /// Reports that the daemon stops and needs up to `time` for that, even if the service's own limit is shorter.
    pub(super) fn stopping(&self, time: Duration) {
        let time = time.as_micros();
        self.tell(&format!("STOPPING=1\nEXTEND_TIMEOUT_USEC={time}"));
    }

    fn tell(&self, message: &str) {
        let Some(address) = &self.0 else {
            return;
        };
        if let Err(error) = send(address, message) {
            tracing::warn!(%error, message, "service manager not told");
        }
    }
}

/// Parses an address: a path, or `@` and a name in the abstract namespace (unix(7)).
fn address(name: &OsStr) -> io::Result<SocketAddr> {
    match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(name),
    }
}

fn send(to: &SocketAddr, message: &str) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(TIMEOUT))?;
    socket.send_to_addr(message.as_bytes(), to).map(drop)
}

#[cfg(test)]
mod tests {
    use std::process;

    use super::*;

    #[test]
    fn service_manager_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let name = format!("@auth-daemon-test-{}", process::id());
        for name in [path.as_os_str(), OsStr::new(&name)] {
            let address = address(name).unwrap();
            let socket = UnixDatagram::bind_addr(&address).unwrap();
            let manager = ServiceManager(Some(address));
            manager.ready();
            manager.stopping(Duration::from_millis(1500));
            let told = || {
                let mut buffer = [0; 100];
                let length = socket.recv(&mut buffer).unwrap();
                String::from_utf8_lossy(&buffer[..length]).into_owned()
            };
            assert_eq!(told(), "READY=1");
            assert_eq!(told(), "STOPPING=1\nEXTEND_TIMEOUT_USEC=1500000");
        }
    }

    #[test]
    fn address_without_a_listener_is_no_reason_to_fail() {
        ServiceManager(Some(address(OsStr::new("/nowhere/notify")).unwrap())).ready();
        assert!(address(OsStr::new(&"x".repeat(200))).is_err());
        ServiceManager(None).ready();
    }
}
