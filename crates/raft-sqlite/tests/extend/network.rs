//! Listeners, connections and certificates of the program's own, their replacement, and members of other versions.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use raft_sqlite::config::PeerTls;
use raft_sqlite::rustls::pki_types::pem::PemObject as _;
use raft_sqlite::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use raft_sqlite::rustls::server::WebPkiClientVerifier;
use raft_sqlite::rustls::{ClientConfig, RootCertStore, ServerConfig, crypto};
use raft_sqlite::{InitialMember, Node, NodeBuilder, NodeConfig, ReadConsistency, StartError, Statement, Value};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::net::TcpListener;

use crate::nodes::PATIENCE;

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// A new certificate for 127.0.0.1.
    fn certify(&self) -> PeerTls {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        PeerTls {
            certificate_pem: params.signed_by(&key, &self.0).unwrap().pem().into_bytes(),
            key_pem: key.serialize_pem().into_bytes(),
            authority_pem: self.0.pem().into_bytes(),
        }
    }
}

/// As a program makes its own; without naming HTTP/2.
fn configs(pem: &PeerTls) -> (ServerConfig, ClientConfig) {
    let provider = Arc::new(crypto::ring::default_provider());
    let certificate = CertificateDer::from_pem_slice(&pem.certificate_pem).unwrap();
    let key = || PrivateKeyDer::from_pem_slice(&pem.key_pem).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&pem.authority_pem).unwrap()).unwrap();
    let roots = Arc::new(roots);
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build().unwrap();
    let server = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![certificate.clone()], key())
        .unwrap();
    let client = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate], key())
        .unwrap();
    (server, client)
}

struct Cluster {
    folder: tempfile::TempDir,
    members: Vec<InitialMember>,
    listeners: Vec<Option<std::net::TcpListener>>,
}

impl Cluster {
    /// Listeners are bound once, by the program: no port is free between two uses of it.
    fn prepare(scheme: &str) -> Self {
        let listeners: Vec<_> = (0..3).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let member = |(number, listener): (usize, &std::net::TcpListener)| InitialMember {
            name: format!("n{number}"),
            peer_urls: vec![format!("{scheme}://{}", listener.local_addr().unwrap())],
        };
        let members = listeners.iter().enumerate().map(member).collect();
        Self { folder: tempfile::tempdir().unwrap(), members, listeners: listeners.into_iter().map(Some).collect() }
    }

    fn config(&self, number: usize) -> NodeConfig {
        let name = format!("n{number}");
        let mut config = NodeConfig::member(self.folder.path().join(&name), &name, self.members.clone()).unwrap();
        config.election_timeout = std::time::Duration::from_secs(2);
        config
    }

    async fn start(&mut self, build: impl Fn(usize, NodeBuilder) -> NodeBuilder) -> Vec<Node> {
        let mut nodes = Vec::new();
        for number in 0..3 {
            let listener = self.listeners[number].take().unwrap();
            let builder = build(number, Node::builder(self.config(number)).peer_listener(listener));
            nodes.push(builder.start().await.unwrap());
        }
        nodes
    }
}

/// Each node writes, and each reads what all wrote.
async fn works(nodes: &[Node], round: i64) {
    for node in nodes {
        node.wait_for_leader(PATIENCE).await.unwrap();
    }
    let database = nodes[0].database("app");
    database.execute("CREATE TABLE IF NOT EXISTS t(k INTEGER PRIMARY KEY)").await.unwrap();
    for (number, node) in nodes.iter().enumerate() {
        let insert = Statement::new("INSERT INTO t VALUES (?)").bind(round * 10 + number as i64);
        node.database("app").execute(insert).await.unwrap();
    }
    let count = Statement::new("SELECT count(*) FROM t WHERE k / 10 = ?").bind(round);
    for node in nodes {
        let rows = node.database("app").query(count.clone(), ReadConsistency::Linearizable).await.unwrap();
        assert_eq!(rows[0][0], Value::Integer(nodes.len() as i64));
    }
}

/// They stop, and let go of what the program gave them.
async fn stop(nodes: Vec<Node>) {
    let addresses: Vec<String> = nodes.iter().flat_map(|node| node.members()).flat_map(|m| m.peer_urls).collect();
    for node in &nodes {
        tokio::time::timeout(PATIENCE, node.shutdown()).await.expect("the node stops").unwrap();
    }
    drop(nodes);
    for address in addresses {
        let address = raft_sqlite::config::host_and_port(&address).unwrap();
        let start = Instant::now();
        while std::net::TcpListener::bind(&address).is_err() {
            assert!(start.elapsed() < PATIENCE, "{address} is still listened on");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn listeners_that_the_program_has_bound() {
    let mut cluster = Cluster::prepare("http");
    let nodes = cluster.start(|_, builder| builder).await;
    works(&nodes, 1).await;
    stop(nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_the_program_takes() {
    let mut cluster = Cluster::prepare("http");
    let taken = Arc::new(AtomicUsize::new(0));
    let mut nodes = Vec::new();
    for number in 0..3 {
        let listener = cluster.listeners[number].take().unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = TcpListener::from_std(listener).unwrap();
        let taken = taken.clone();
        let connections = futures_util::stream::unfold(listener, move |listener| {
            let taken = taken.clone();
            async move {
                let (stream, _) = listener.accept().await.ok()?;
                taken.fetch_add(1, Ordering::Relaxed);
                Some((stream, listener))
            }
        });
        let builder = Node::builder(cluster.config(number)).peer_connections(connections);
        nodes.push(builder.start().await.unwrap());
    }
    works(&nodes, 1).await;
    assert!(taken.load(Ordering::Relaxed) >= 4);
    stop(nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_replaced_while_the_cluster_runs() {
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    let mut cluster = Cluster::prepare("https");
    let mut nodes = Vec::new();
    for number in 0..3 {
        let mut config = cluster.config(number);
        config.peer_tls = Some(old.certify());
        let listener = cluster.listeners[number].take().unwrap();
        nodes.push(Node::builder(config).peer_listener(listener).start().await.unwrap());
    }
    works(&nodes, 1).await;
    // A mistake leaves what was in force.
    let mut wrong = old.certify();
    wrong.key_pem = b"no key".to_vec();
    let error = nodes[0].replace_peer_tls(&wrong).unwrap_err();
    assert!(error.contains("peer TLS: the key"), "{error}");
    wrong = old.certify();
    wrong.key_pem = new.certify().key_pem;
    let error = nodes[0].replace_peer_tls(&wrong).unwrap_err();
    assert!(error.contains("peer TLS"), "{error}");
    works(&nodes, 2).await;

    // The usual rotation: first everybody trusts both authorities, then the certificates change, then the old authority goes.
    let both = |mut pem: PeerTls| {
        pem.authority_pem = [old.0.pem().as_bytes(), new.0.pem().as_bytes()].concat();
        pem
    };
    let steps: [&dyn Fn() -> PeerTls; 3] = [&|| both(old.certify()), &|| both(new.certify()), &|| new.certify()];
    for (round, step) in steps.into_iter().enumerate() {
        for node in &nodes {
            node.replace_peer_tls(&step()).unwrap();
        }
        works(&nodes, 3 + round as i64).await;
    }
    // New connections have no other choice: a member that starts again with the new ones is let in, with the old ones not.
    let away = nodes.pop().unwrap();
    let address = raft_sqlite::config::host_and_port(&cluster.members[2].peer_urls[0]).unwrap();
    away.shutdown().await.unwrap();
    drop(away);
    let restart = async |pem: PeerTls| {
        let start = Instant::now();
        loop {
            let mut config = cluster.config(2);
            config.peer_tls = Some(pem.clone());
            config.listen_peers = vec![address.clone()];
            match Node::start(config).await {
                Ok(node) => return node,
                Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
            }
        }
    };
    let stranger = restart(old.certify()).await;
    let found = stranger.wait_for_leader(std::time::Duration::from_secs(3)).await;
    assert!(found.is_err(), "a member with certificates of the old authority found the leader");
    stranger.shutdown().await.unwrap();
    drop(stranger);
    nodes.push(restart(new.certify()).await);
    works(&nodes, 6).await;
    stop(nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rustls_configurations_of_the_program() {
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    let mut cluster = Cluster::prepare("https");
    let nodes = cluster
        .start(|_, builder| {
            let (server, client) = configs(&ours.certify());
            builder.peer_rustls(server, client)
        })
        .await;
    works(&nodes, 1).await;
    for node in &nodes {
        let (server, client) = configs(&ours.certify());
        node.replace_peer_rustls(server, client).unwrap();
    }
    works(&nodes, 2).await;
    stop(nodes).await;

    // What does not fit together is told before anything is written.
    let folder = tempfile::tempdir().unwrap();
    let single = || NodeConfig::single(folder.path());
    let (server, client) = configs(&theirs.certify());
    let error = Node::builder(single()).peer_rustls(server, client).start().await.unwrap_err();
    assert!(matches!(&error, StartError::Configuration(why) if why.contains("make it https://")), "{error:?}");
    let cluster = Cluster::prepare("https");
    let error = Node::start(cluster.config(0)).await.unwrap_err();
    assert!(error.to_string().contains("has no certificates for peers"), "{error}");
    let (server, client) = configs(&theirs.certify());
    let mut config = cluster.config(0);
    config.peer_tls = Some(theirs.certify());
    let error = Node::builder(config).peer_rustls(server, client).start().await.unwrap_err();
    assert!(error.to_string().contains("peer TLS is given twice"), "{error}");
    let node = Node::start(single()).await.unwrap();
    let error = node.replace_peer_tls(&theirs.certify()).unwrap_err();
    assert!(error.contains("started without TLS"), "{error}");
    node.shutdown().await.unwrap();
}
