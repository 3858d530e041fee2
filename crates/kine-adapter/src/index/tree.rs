//! A persistent ordered tree: a B+ tree whose nodes are shared between clones and copied when one of them changes.
//!
//! ```text
//!            Inner [ (first, summary, node) ... ]          summary = sum over the subtree
//!           /            |            \
//!   Leaf [items]   Leaf [items]   Leaf [items]             all leaves at one depth
//! ```
//!
//! A clone costs one reference count. A change copies the nodes from the root to one leaf, those of them that another
//! clone still shares; a tree that shares nothing is changed in place. Inner nodes keep a summary of each subtree, so
//! that counts need not walk the items ([`Tree::visit`]).
//!
//! Invariants: items ascend strictly; all leaves have one depth; a node holds at most [`MAX`] entries, and at least
//! [`MIN`] unless it is the root; `first` of a child but the first is no greater than its least item and greater than
//! every item before it; the heads of a node are those of its keys (of an inner node: of `first` of all children but
//! the first).

use super::heads::{Heads, Key};
use std::borrow::Borrow;
use std::ops::ControlFlow;
use std::sync::Arc;

/// Entries of a node: small enough that copying a node is cheap, large enough that the tree is shallow.
pub(crate) const MAX: usize = 32;
/// Entries below which a node is joined with its neighbour.
const MIN: usize = MAX / 4;
/// Room that a full copy of a node is given at a time: most copies see one change only.
const SPARE: usize = 4;

/// What a tree keeps of a subtree.
pub(crate) trait Summary: Copy + Default + std::fmt::Debug {
    /// Adds a part.
    fn add(&mut self, other: &Self);
    /// Takes a part away. Maxima may stay as they are: they are bounds.
    fn subtract(&mut self, other: &Self);
}

impl Summary for () {
    fn add(&mut self, (): &()) {}
    fn subtract(&mut self, (): &()) {}
}

/// What a tree holds.
pub(crate) trait Item: Clone {
    /// What items are ordered by.
    type Key: Key + ?Sized;
    /// A key to keep.
    type Owned: Clone + Borrow<Self::Key> + std::fmt::Debug;
    /// What inner nodes keep.
    type Summary: Summary;
    /// The key.
    fn key(&self) -> &Self::Key;
    /// The key, to keep.
    fn owned_key(&self) -> Self::Owned;
    /// This item's part of the summary.
    fn summary(&self) -> Self::Summary;
}

/// What [`Tree::visit`] asks of a subtree that lies wholly in the range.
pub(crate) enum Subtree {
    /// It is dealt with.
    Done,
    /// Its items must be looked at.
    Enter,
}

/// Walks a range of a tree in order.
pub(crate) trait Visitor<'a, T: Item> {
    /// Before a subtree is entered.
    fn subtree(&mut self, summary: &T::Summary) -> Subtree;
    /// An item in the range.
    fn item(&mut self, item: &'a T) -> ControlFlow<()>;
}

#[derive(Debug)]
enum Node<T: Item> {
    Leaf(Leaf<T>),
    Inner(Inner<T>),
}

#[derive(Debug)]
struct Leaf<T: Item> {
    heads: Heads,
    items: Vec<T>,
}

#[derive(Debug)]
struct Inner<T: Item> {
    heads: Heads,
    children: Vec<Child<T>>,
}

#[derive(Debug)]
struct Child<T: Item> {
    first: T::Owned,
    summary: T::Summary,
    node: Arc<Node<T>>,
}

impl<T: Item> Clone for Child<T> {
    fn clone(&self) -> Self {
        Child { first: self.first.clone(), summary: self.summary, node: Arc::clone(&self.node) }
    }
}

fn copy_with_room<E: Clone>(entries: &[E]) -> Vec<E> {
    let mut copy = Vec::with_capacity(entries.len() + SPARE);
    copy.extend_from_slice(entries);
    copy
}

fn make_room<E>(entries: &mut Vec<E>) {
    if entries.len() == entries.capacity() {
        entries.reserve_exact(SPARE);
    }
}

impl<T: Item> Leaf<T> {
    fn new(items: Vec<T>) -> Leaf<T> {
        let heads = Heads::of(items.iter().map(Item::key), SPARE);
        Leaf { heads, items }
    }

    fn search(&self, key: &T::Key) -> Result<usize, usize> {
        self.heads.search(key, |at| self.items[at].key())
    }

    fn insert(&mut self, at: usize, item: T) {
        let fits = self.items.first().is_some_and(|other| self.heads.insert(at, item.key(), other.key()));
        make_room(&mut self.items);
        self.items.insert(at, item);
        if !fits {
            self.heads = Heads::of(self.items.iter().map(Item::key), SPARE);
        }
    }

    fn remove(&mut self, at: usize) -> T {
        self.heads.remove(at);
        self.items.remove(at)
    }
}

impl<T: Item> Inner<T> {
    fn new(children: Vec<Child<T>>) -> Inner<T> {
        let mut inner = Inner { heads: Heads::default(), children };
        inner.note_heads();
        inner
    }

    fn note_heads(&mut self) {
        self.heads = Heads::of(self.children[1..].iter().map(|child| child.first.borrow()), SPARE);
    }

    /// The child that holds `key`, if any does.
    fn child_for(&self, key: &T::Key) -> usize {
        match self.heads.search(key, |at| self.children[at + 1].first.borrow()) {
            Ok(at) => at + 1,
            Err(at) => at,
        }
    }

    /// Puts a child in, which is not to be the first.
    fn insert(&mut self, at: usize, child: Child<T>) {
        let other = self.children.get(1);
        let fits = other.is_some_and(|other| self.heads.insert(at - 1, child.first.borrow(), other.first.borrow()));
        make_room(&mut self.children);
        self.children.insert(at, child);
        if !fits {
            self.note_heads();
        }
    }

    /// Makes one node, or two of equal size, of the children at `at` and `at + 1`.
    fn join(&mut self, at: usize) {
        let right = self.children.remove(at + 1);
        let left = &mut self.children[at];
        let node = Arc::make_mut(&mut left.node);
        match (&mut *node, &*right.node) {
            (Node::Leaf(leaf), Node::Leaf(more)) => {
                leaf.items.extend_from_slice(&more.items);
                *leaf = Leaf::new(std::mem::take(&mut leaf.items));
            }
            (Node::Inner(inner), Node::Inner(more)) => {
                let from = inner.children.len();
                inner.children.extend_from_slice(&more.children);
                // What the right node kept for its first child is no bound; what its parent kept for it is.
                inner.children[from].first = right.first;
                inner.note_heads();
            }
            _ => unreachable!("invariant: all leaves have one depth"),
        }
        let split = (node.len() > MAX).then(|| node.split_off(node.len() / 2));
        left.summary = left.node.summary();
        if let Some(right) = split {
            self.children.insert(at + 1, right);
        }
        self.note_heads();
    }
}

impl<T: Item> Clone for Node<T> {
    fn clone(&self) -> Self {
        match self {
            Node::Leaf(leaf) => Node::Leaf(Leaf { heads: leaf.heads.clone(), items: copy_with_room(&leaf.items) }),
            Node::Inner(inner) => {
                Node::Inner(Inner { heads: inner.heads.clone(), children: copy_with_room(&inner.children) })
            }
        }
    }
}

/// What an insertion did.
struct Inserted<T: Item> {
    replaced: Option<T>,
    /// Of the item that is there now.
    summary: T::Summary,
    /// The right half, if the node had to be split.
    split: Option<Child<T>>,
}

impl<T: Item> Node<T> {
    fn len(&self) -> usize {
        match self {
            Node::Leaf(leaf) => leaf.items.len(),
            Node::Inner(inner) => inner.children.len(),
        }
    }

    fn summary(&self) -> T::Summary {
        let mut sum = T::Summary::default();
        match self {
            Node::Leaf(leaf) => leaf.items.iter().for_each(|item| sum.add(&item.summary())),
            Node::Inner(inner) => inner.children.iter().for_each(|child| sum.add(&child.summary)),
        }
        sum
    }

    /// A key that is no greater than any in this node, or what stands for it in the first child; there is one.
    fn first(&self) -> T::Owned {
        match self {
            Node::Leaf(leaf) => leaf.items[0].owned_key(),
            Node::Inner(inner) => inner.children[0].first.clone(),
        }
    }

    /// Moves the entries from `at` on to a new node to the right.
    fn split_off(&mut self, at: usize) -> Child<T> {
        let right = match self {
            Node::Leaf(leaf) => {
                let right = leaf.items.split_off(at);
                *leaf = Leaf::new(std::mem::take(&mut leaf.items));
                Node::Leaf(Leaf::new(right))
            }
            Node::Inner(inner) => {
                let right = inner.children.split_off(at);
                inner.note_heads();
                Node::Inner(Inner::new(right))
            }
        };
        Child { first: right.first(), summary: right.summary(), node: Arc::new(right) }
    }

    /// Puts the item in that `make` makes of the one with that key. `last` tells that this is the rightmost node of its
    /// level: then keys are likely to come in order, and the left half of a split stays nearly full.
    fn insert(self: &mut Arc<Self>, key: &T::Key, last: bool, make: impl FnOnce(Option<&T>) -> T) -> Inserted<T> {
        let node = Arc::make_mut(self);
        let mut inserted = match node {
            Node::Leaf(leaf) => match leaf.search(key) {
                Ok(at) => {
                    let item = make(Some(&leaf.items[at]));
                    let summary = item.summary();
                    let replaced = Some(std::mem::replace(&mut leaf.items[at], item));
                    return Inserted { replaced, summary, split: None };
                }
                Err(at) => {
                    let item = make(None);
                    let summary = item.summary();
                    leaf.insert(at, item);
                    Inserted { replaced: None, summary, split: None }
                }
            },
            Node::Inner(inner) => {
                let at = inner.child_for(key);
                let last = last && at + 1 == inner.children.len();
                let child = &mut inner.children[at];
                let mut inserted = child.node.insert(key, last, make);
                match inserted.split.take() {
                    Some(right) => {
                        child.summary = child.node.summary();
                        inner.insert(at + 1, right);
                    }
                    None => {
                        if let Some(replaced) = &inserted.replaced {
                            child.summary.subtract(&replaced.summary());
                        }
                        child.summary.add(&inserted.summary);
                    }
                }
                inserted
            }
        };
        inserted.split = (node.len() > MAX).then(|| node.split_off(if last { MAX - MIN } else { MAX / 2 }));
        inserted
    }

    /// Takes an item out that is known to be there.
    fn remove(self: &mut Arc<Self>, key: &T::Key) -> Option<T> {
        match Arc::make_mut(self) {
            Node::Leaf(leaf) => {
                let at = leaf.search(key).ok()?;
                Some(leaf.remove(at))
            }
            Node::Inner(inner) => {
                let at = inner.child_for(key);
                let child = &mut inner.children[at];
                let removed = child.node.remove(key)?;
                child.summary.subtract(&removed.summary());
                if child.node.len() < MIN && inner.children.len() > 1 {
                    inner.join(at.min(inner.children.len() - 2));
                }
                Some(removed)
            }
        }
    }

    fn visit<'a, V: Visitor<'a, T>>(
        &'a self,
        start: Option<&T::Key>,
        end: Option<&T::Key>,
        visitor: &mut V,
    ) -> ControlFlow<()> {
        match self {
            Node::Leaf(leaf) => {
                let from = start.map_or(0, |start| leaf.search(start).unwrap_or_else(|at| at));
                let to = end.map_or(leaf.items.len(), |end| leaf.search(end).unwrap_or_else(|at| at));
                leaf.items[from..to.max(from)].iter().try_for_each(|item| visitor.item(item))?;
            }
            Node::Inner(inner) => {
                let children = &inner.children;
                let from = start.map_or(0, |start| inner.child_for(start));
                let to = end.map_or(children.len() - 1, |end| inner.child_for(end));
                for (at, child) in children.iter().enumerate().take(to + 1).skip(from) {
                    // Whole unless the range starts or ends in it.
                    let start = start.filter(|_| at == from);
                    let end = end.filter(|_| at == to);
                    let whole = start.is_none() && end.is_none();
                    if whole && matches!(visitor.subtree(&child.summary), Subtree::Done) {
                        continue;
                    }
                    child.node.visit(start, end, visitor)?;
                }
            }
        }
        ControlFlow::Continue(())
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Tree<T: Item> {
    root: Arc<Node<T>>,
    len: usize,
}

impl<T: Item> Clone for Tree<T> {
    fn clone(&self) -> Self {
        Tree { root: Arc::clone(&self.root), len: self.len }
    }
}

impl<T: Item> Default for Tree<T> {
    fn default() -> Self {
        Tree { root: Arc::new(Node::Leaf(Leaf::new(Vec::new()))), len: 0 }
    }
}

impl<T: Item> Tree<T> {
    /// A tree of items that ascend strictly.
    pub(crate) fn from_ascending(items: impl IntoIterator<Item = T>) -> Tree<T> {
        let mut tree = Tree::default();
        let mut leaves = Vec::new();
        let mut leaf = Vec::with_capacity(FILL);
        for item in items {
            if leaf.len() == FILL {
                leaves.push(std::mem::replace(&mut leaf, Vec::with_capacity(FILL)));
            }
            leaf.push(item);
            tree.len += 1;
        }
        leaves.push(leaf);
        even_out_last(&mut leaves);
        let mut level: Vec<Node<T>> = leaves.into_iter().map(|items| Node::Leaf(Leaf::new(items))).collect();
        while level.len() > 1 {
            let mut parents = Vec::with_capacity(level.len() / FILL + 1);
            let mut children = Vec::with_capacity(FILL);
            for node in level {
                if children.len() == FILL {
                    parents.push(std::mem::replace(&mut children, Vec::with_capacity(FILL)));
                }
                children.push(Child { first: node.first(), summary: node.summary(), node: Arc::new(node) });
            }
            parents.push(children);
            even_out_last(&mut parents);
            level = parents.into_iter().map(|children| Node::Inner(Inner::new(children))).collect();
        }
        if let Some(root) = level.pop() {
            tree.root = Arc::new(root);
        }
        tree
    }

    /// Number of items.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The sum over all items.
    pub(crate) fn summary(&self) -> T::Summary {
        self.root.summary()
    }

    /// The item with that key.
    pub(crate) fn get(&self, key: &T::Key) -> Option<&T> {
        let mut node = &*self.root;
        loop {
            match node {
                Node::Leaf(leaf) => return leaf.search(key).ok().map(|at| &leaf.items[at]),
                Node::Inner(inner) => node = &inner.children[inner.child_for(key)].node,
            }
        }
    }

    /// Puts an item in and returns the one that it replaced.
    pub(crate) fn insert(&mut self, item: T) -> Option<T> {
        let key = item.owned_key();
        self.update(key.borrow(), |_| item)
    }

    /// Puts the item in that `make` makes of the one with that key, and returns that one. The new one has the key.
    pub(crate) fn update(&mut self, key: &T::Key, make: impl FnOnce(Option<&T>) -> T) -> Option<T> {
        let inserted = self.root.insert(key, true, make);
        if let Some(right) = inserted.split {
            let left = Child { first: self.root.first(), summary: self.root.summary(), node: Arc::clone(&self.root) };
            self.root = Arc::new(Node::Inner(Inner::new(vec![left, right])));
        }
        self.len += usize::from(inserted.replaced.is_none());
        inserted.replaced
    }

    /// Takes an item out.
    pub(crate) fn remove(&mut self, key: &T::Key) -> Option<T> {
        self.get(key)?; // so that nothing is copied for a key that is not there
        let removed = self.root.remove(key);
        if let Node::Inner(inner) = &*self.root
            && inner.children.len() == 1
        {
            self.root = Arc::clone(&inner.children[0].node);
        }
        self.len -= usize::from(removed.is_some());
        removed
    }

    /// Shows the visitor what is in `[start, end)`, in order, until it has enough.
    pub(crate) fn visit<'a, V: Visitor<'a, T>>(
        &'a self,
        start: Option<&T::Key>,
        end: Option<&T::Key>,
        visitor: &mut V,
    ) {
        if let (Some(start), Some(end)) = (start, end)
            && start >= end
        {
            return;
        }
        let _ = self.root.visit(start, end, visitor);
    }

    /// All items, in order.
    pub(crate) fn iter(&self) -> Iter<'_, T> {
        let mut iter = Iter { inner: Vec::new(), leaf: [].iter() };
        iter.descend(&self.root);
        iter
    }
}

/// Entries of a node of a tree built at once: some room for what comes.
const FILL: usize = MAX - MIN;

/// Gives the last node of a level enough entries.
fn even_out_last<E>(level: &mut Vec<Vec<E>>) {
    if level.len() > 1 && level.last().is_some_and(|last| last.len() < MIN) {
        let last = level.pop();
        if let (Some(before), Some(last)) = (level.last_mut(), last) {
            before.extend(last);
        }
    }
}

/// See [`Tree::iter`].
#[derive(Debug)]
pub(crate) struct Iter<'a, T: Item> {
    inner: Vec<std::slice::Iter<'a, Child<T>>>,
    leaf: std::slice::Iter<'a, T>,
}

impl<'a, T: Item> Iter<'a, T> {
    fn descend(&mut self, mut node: &'a Node<T>) {
        loop {
            match node {
                Node::Leaf(leaf) => {
                    self.leaf = leaf.items.iter();
                    return;
                }
                Node::Inner(inner) => {
                    let mut rest = inner.children.iter();
                    let Some(first) = rest.next() else { return };
                    self.inner.push(rest);
                    node = &first.node;
                }
            }
        }
    }
}

impl<'a, T: Item> Iterator for Iter<'a, T> {
    type Item = &'a T;

    fn next(&mut self) -> Option<&'a T> {
        loop {
            if let Some(item) = self.leaf.next() {
                return Some(item);
            }
            let rest = self.inner.last_mut()?;
            match rest.next() {
                Some(child) => self.descend(&child.node),
                None => {
                    self.inner.pop();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// (key, weight): the summary is the number of items, their weight, and a bound of the greatest weight.
    #[derive(Debug, Clone, PartialEq)]
    struct Weighed(i64, u32);

    #[derive(Debug, Clone, Copy, Default, PartialEq)]
    struct Sum {
        items: usize,
        weight: u64,
        greatest: u32,
    }

    impl Summary for Sum {
        fn add(&mut self, other: &Sum) {
            self.items += other.items;
            self.weight += other.weight;
            self.greatest = self.greatest.max(other.greatest);
        }
        fn subtract(&mut self, other: &Sum) {
            self.items -= other.items;
            self.weight -= other.weight;
        }
    }

    impl Item for Weighed {
        type Key = i64;
        type Owned = i64;
        type Summary = Sum;
        fn key(&self) -> &i64 {
            &self.0
        }
        fn owned_key(&self) -> i64 {
            self.0
        }
        fn summary(&self) -> Sum {
            Sum { items: 1, weight: u64::from(self.1), greatest: self.1 }
        }
    }

    fn check_node(node: &Node<Weighed>, root: bool, low: Option<i64>, high: Option<i64>) -> (usize, Sum) {
        assert!(node.len() <= MAX && (root || node.len() >= MIN), "{} entries", node.len());
        match node {
            Node::Leaf(Leaf { heads, items }) => {
                assert_eq!(heads.len(), items.len());
                assert!(items.windows(2).all(|w| w[0].0 < w[1].0));
                assert!(items.iter().all(|i| low.is_none_or(|l| i.0 >= l) && high.is_none_or(|h| i.0 < h)));
                (1, node.summary())
            }
            Node::Inner(Inner { heads, children }) => {
                assert!(children.len() >= 2 && heads.len() == children.len() - 1);
                let mut depth = None;
                for (at, child) in children.iter().enumerate() {
                    let low = if at == 0 { low } else { Some(child.first) };
                    let high = children.get(at + 1).map(|next| next.first).or(high);
                    let (below, sum) = check_node(&child.node, false, low, high);
                    assert_eq!((child.summary.items, child.summary.weight), (sum.items, sum.weight));
                    assert!(child.summary.greatest >= sum.greatest);
                    assert_eq!(*depth.get_or_insert(below), below);
                }
                (depth.unwrap_or(0) + 1, node.summary())
            }
        }
    }

    fn check(tree: &Tree<Weighed>, model: &BTreeMap<i64, u32>) {
        let (_, sum) = check_node(&tree.root, true, None, None);
        assert_eq!((tree.len(), sum.items), (model.len(), model.len()));
        assert!(tree.iter().map(|i| (i.0, i.1)).eq(model.iter().map(|(k, v)| (*k, *v))));
    }

    /// Sums by summaries where it can, and remembers the items where it cannot.
    struct Summing(Sum, usize);
    impl<'a> Visitor<'a, Weighed> for Summing {
        fn subtree(&mut self, summary: &Sum) -> Subtree {
            self.0.add(summary);
            Subtree::Done
        }
        fn item(&mut self, item: &'a Weighed) -> ControlFlow<()> {
            self.0.add(&item.summary());
            self.1 += 1;
            ControlFlow::Continue(())
        }
    }

    /// Takes the first few items heavier than a bound.
    struct Heavy<'a>(u32, usize, Vec<&'a Weighed>);
    impl<'a> Visitor<'a, Weighed> for Heavy<'a> {
        fn subtree(&mut self, summary: &Sum) -> Subtree {
            if summary.greatest > self.0 { Subtree::Enter } else { Subtree::Done }
        }
        fn item(&mut self, item: &'a Weighed) -> ControlFlow<()> {
            if item.1 > self.0 {
                self.2.push(item);
            }
            if self.2.len() >= self.1 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Insert(i64, u32),
        Remove(i64),
        Clear(i64, i64),
        Keep,
        Sum(Option<i64>, Option<i64>),
        Heavy(u32, usize, i64),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let key = 0_i64..600;
        let step = prop_oneof![
            12 => (key.clone(), any::<u32>()).prop_map(|(k, w)| Step::Insert(k, w)),
            6 => key.clone().prop_map(Step::Remove),
            1 => (key.clone(), 0_i64..120).prop_map(|(k, n)| Step::Clear(k, n)),
            1 => Just(Step::Keep),
            2 => (proptest::option::of(key.clone()), proptest::option::of(key.clone())).prop_map(|(a, b)| Step::Sum(a, b)),
            1 => (any::<u32>(), 1_usize..20, key).prop_map(|(w, n, k)| Step::Heavy(w, n, k)),
        ];
        proptest::collection::vec(step, 1..1200)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn behaves_as_a_map_and_clones_do_not_change(steps in steps(), built in 0_i64..500) {
            let mut model: BTreeMap<i64, u32> = (0..built).map(|k| (k, k as u32 * 7)).collect();
            let mut tree = Tree::from_ascending(model.iter().map(|(k, w)| Weighed(*k, *w)));
            check(&tree, &model);
            let mut kept = Vec::new();
            for step in steps {
                match step {
                    Step::Insert(k, w) => {
                        prop_assert_eq!(tree.insert(Weighed(k, w)).map(|i| i.1), model.insert(k, w));
                    }
                    Step::Remove(k) => prop_assert_eq!(tree.remove(&k).map(|i| i.1), model.remove(&k)),
                    Step::Clear(k, n) => {
                        for k in k..k + n {
                            prop_assert_eq!(tree.remove(&k).map(|i| i.1), model.remove(&k));
                        }
                        check(&tree, &model);
                    }
                    Step::Keep => kept.push((tree.clone(), model.clone())),
                    Step::Sum(a, b) => {
                        let mut sum = Summing(Sum::default(), 0);
                        tree.visit(a.as_ref(), b.as_ref(), &mut sum);
                        let want = model.iter().filter(|(k, _)| a.is_none_or(|a| **k >= a) && b.is_none_or(|b| **k < b));
                        let (mut items, mut weight) = (0, 0);
                        want.for_each(|(_, w)| (items, weight) = (items + 1, weight + u64::from(*w)));
                        prop_assert_eq!((sum.0.items, sum.0.weight), (items, weight));
                        prop_assert!(sum.1 <= 2 * MAX, "looked at {} items", sum.1);
                    }
                    Step::Heavy(w, n, k) => {
                        let mut heavy = Heavy(w, n, Vec::new());
                        tree.visit(Some(&k), None, &mut heavy);
                        let got: Vec<_> = heavy.2.iter().map(|i| (i.0, i.1)).collect();
                        let want: Vec<_> =
                            model.range(k..).filter(|(_, v)| **v > w).take(n).map(|(k, v)| (*k, *v)).collect();
                        prop_assert_eq!(got, want);
                    }
                }
                prop_assert_eq!(tree.len(), model.len());
            }
            check(&tree, &model);
            for (tree, model) in &kept {
                check(tree, model);
            }
        }
    }

    #[test]
    fn keys_in_order_leave_full_leaves() {
        let mut tree = Tree::default();
        for k in 0..6000 {
            tree.insert(Weighed(k, 1));
        }
        check(&tree, &(0..6000).map(|k| (k, 1)).collect());
        fn leaves(node: &Node<Weighed>) -> usize {
            match node {
                Node::Leaf(_) => 1,
                Node::Inner(inner) => inner.children.iter().map(|c| leaves(&c.node)).sum(),
            }
        }
        assert!(leaves(&tree.root) <= 6000 / (MAX - MIN) + 1);
    }

    #[test]
    fn an_unshared_tree_is_changed_in_place() {
        let mut tree = Tree::from_ascending((0..200).map(|k| Weighed(k, 0)));
        let root = Arc::as_ptr(&tree.root);
        tree.insert(Weighed(77, 1));
        assert_eq!(root, Arc::as_ptr(&tree.root));
        let kept = tree.clone();
        tree.insert(Weighed(77, 2));
        assert_ne!(root, Arc::as_ptr(&tree.root));
        assert_eq!(kept.get(&77), Some(&Weighed(77, 1)));
    }
}
