//! The line of a connection with OpenTelemetry's attribute names, where its semantic conventions have one.
//!
//! `server` is what the client dialled, `network.local` and `network.peer` are the two ends as this node sees them, and what
//! the conventions do not name is below `auth_daemon`.

use std::net::SocketAddr;

use super::{Direction, Finished, Outcome, Path};

impl Finished {
    /// Writes the line.
    pub(super) fn write_opentelemetry(&self) {
        let (local, peer) = match self.direction {
            Direction::Outbound => (Some(self.client), self.endpoint),
            Direction::Inbound => (self.endpoint, Some(self.client)),
        };
        let ip = |at: Option<SocketAddr>| at.map(|at| at.ip().to_string());
        let port = |at: Option<SocketAddr>| at.map(|at| at.port());
        let has_tls = self.has_tls();
        tracing::info!(
            target: "access",
            {
                client.address = ip(Some(self.client)),
                client.port = self.client.port(),
                server.address = ip(self.destination),
                server.port = port(self.destination),
                network.transport = "tcp",
                "network.type" = if self.client.is_ipv4() { "ipv4" } else { "ipv6" },
                network.local.address = ip(local),
                network.local.port = port(local),
                network.peer.address = ip(peer),
                network.peer.port = port(peer),
                tls.established = has_tls,
                tls.protocol.name = has_tls.then_some("tls"),
                tls.protocol.version = has_tls.then_some("1.3"),
                "error.type" = self.error_type(),
                error.message = (!self.reason.is_empty()).then_some(self.reason.as_str()),
                auth_daemon.direction = self.direction.name(),
                auth_daemon.path = self.path.name(),
                auth_daemon.result = self.outcome.name(),
                auth_daemon.client.identity = self.client_identity.as_ref().map(|id| id.as_str()),
                auth_daemon.client.person = self.client_person.as_deref(),
                auth_daemon.server.identity = self.server_identity.as_ref().map(|id| id.as_str()),
                auth_daemon.service = self.service.as_ref().map(ToString::to_string),
                auth_daemon.policy = self.judgement.policies.as_deref(),
                auth_daemon.bytes_to_server = self.bytes_to_server,
                auth_daemon.bytes_to_client = self.bytes_to_client,
                auth_daemon.duration_ms = self.duration.as_millis() as u64,
            },
            "connection"
        );
    }

    /// Whether both sides have proven who they are in a TLS handshake.
    fn has_tls(&self) -> bool {
        matches!(self.path, Path::Tunnel | Path::Hbone)
            && self.client_identity.is_some()
            && self.server_identity.is_some()
    }

    fn error_type(&self) -> Option<&'static str> {
        match self.outcome {
            Outcome::Ok => None,
            Outcome::Refused if self.judgement.is_denied => Some("denied"),
            Outcome::Refused | Outcome::Reset => Some(self.outcome.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Arc, Mutex},
    };

    use auth_mesh::ObjectName;
    use serde_json::{Value, json};
    use tracing_subscriber::fmt::MakeWriter;

    use super::*;
    use crate::observe::judgement::Judgement;

    #[derive(Clone, Default)]
    struct Text(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Text {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for Text {
        type Writer = Self;

        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }

    /// The line of a connection, without what every line of the log has.
    fn line(finished: &Finished) -> Value {
        let text = Text::default();
        let lines = tracing_subscriber::fmt().with_writer(text.clone()).json();
        let log = lines.flatten_event(true).finish();
        tracing::subscriber::with_default(log, || finished.write_opentelemetry());
        let mut line: Value = serde_json::from_slice(&text.0.lock().unwrap()).unwrap();
        let fields = line.as_object_mut().unwrap();
        for name in ["timestamp", "level", "target", "message"] {
            assert!(fields.remove(name).is_some(), "{name}");
        }
        line
    }

    fn through_a_service(direction: Direction) -> Finished {
        let identity = |account: &str| {
            let identity = format!("spiffe://cluster.local/ns/shop/sa/{account}");
            Some(identity.parse().unwrap())
        };
        Finished {
            direction,
            destination: Some(([10, 96, 0, 1], 80).into()),
            endpoint: Some(([10, 0, 1, 1], 8080).into()),
            service: (direction == Direction::Outbound).then(|| {
                Arc::new(ObjectName {
                    namespace: "shop".into(),
                    name: "pay".into(),
                })
            }),
            client_identity: identity("cart"),
            server_identity: identity("pay"),
            ..Finished::example()
        }
    }

    #[test]
    fn each_field_of_a_connection_has_its_name() {
        let mut expected = json!({
            "client.address": "10.0.0.1", "client.port": 4000,
            "server.address": "10.96.0.1", "server.port": 80,
            "network.transport": "tcp", "network.type": "ipv4",
            "network.local.address": "10.0.0.1", "network.local.port": 4000,
            "network.peer.address": "10.0.1.1", "network.peer.port": 8080,
            "tls.established": true, "tls.protocol.name": "tls", "tls.protocol.version": "1.3",
            "auth_daemon.direction": "outbound", "auth_daemon.path": "tunnel", "auth_daemon.result": "ok",
            "auth_daemon.client.identity": "spiffe://cluster.local/ns/shop/sa/cart",
            "auth_daemon.server.identity": "spiffe://cluster.local/ns/shop/sa/pay",
            "auth_daemon.service": "shop/pay",
            "auth_daemon.bytes_to_server": 3, "auth_daemon.bytes_to_client": 4, "auth_daemon.duration_ms": 5,
        });
        assert_eq!(line(&through_a_service(Direction::Outbound)), expected);

        // The server's node sees the same connection from the other end, and does not learn the Service.
        let fields = expected.as_object_mut().unwrap();
        fields.remove("auth_daemon.service");
        fields.insert("auth_daemon.direction".into(), "inbound".into());
        for (name, value) in [
            ("network.local.address", json!("10.0.1.1")),
            ("network.local.port", json!(8080)),
            ("network.peer.address", json!("10.0.0.1")),
            ("network.peer.port", json!(4000)),
        ] {
            fields.insert(name.into(), value);
        }
        assert_eq!(line(&through_a_service(Direction::Inbound)), expected);
    }

    #[test]
    fn an_error_has_a_type_and_what_is_unknown_is_absent() {
        let denied = Finished {
            path: Path::Plaintext,
            client: "[fd00::1]:9".parse().unwrap(),
            outcome: Outcome::Refused,
            reason: "denied: plaintext".into(),
            judgement: Judgement {
                policies: Some("denied by x".into()),
                is_denied: true,
                ..Judgement::default()
            },
            ..Finished::example()
        };
        let expected = json!({
            "client.address": "fd00::1", "client.port": 9,
            "network.transport": "tcp", "network.type": "ipv6",
            "network.peer.address": "fd00::1", "network.peer.port": 9,
            "tls.established": false,
            "error.type": "denied", "error.message": "denied: plaintext",
            "auth_daemon.direction": "inbound", "auth_daemon.path": "plaintext", "auth_daemon.result": "refused",
            "auth_daemon.policy": "denied by x",
            "auth_daemon.bytes_to_server": 3, "auth_daemon.bytes_to_client": 4, "auth_daemon.duration_ms": 5,
        });
        assert_eq!(line(&denied), expected);
        for (outcome, expected) in [(Outcome::Refused, "refused"), (Outcome::Reset, "reset")] {
            let finished = Finished {
                outcome,
                ..Finished::example()
            };
            assert_eq!(line(&finished)["error.type"], expected);
        }
    }
}
