//! Which parts of a buffer changed: rectangles in buffer pixels, few of them, always inside the buffer.

/// More rectangles than this are merged into their bounding box.
const MAX_RECTS: usize = 16;

/// A non-empty rectangle of pixels, half open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rect {
    /// Left edge.
    pub x0: u32,
    /// Top edge.
    pub y0: u32,
    /// One past the right edge.
    pub x1: u32,
    /// One past the bottom edge.
    pub y1: u32,
}

impl Rect {
    /// The rectangle at `x, y`, `scale` times enlarged, as far as it lies in the positive quadrant.
    ///
    /// Applications commonly ask for "everything" as `i32::MAX` squared, hence the wide arithmetic.
    pub fn new([x, y, width, height]: [i32; 4], scale: u32) -> Option<Self> {
        let scale = i64::from(scale.max(1));
        let edge = |at: i64| u32::try_from((at * scale).clamp(0, i64::from(u32::MAX))).unwrap_or(u32::MAX);
        let far = |at: i32, len: i32| edge(i64::from(at) + i64::from(len.max(0)));
        let rect = Self { x0: edge(i64::from(x)), y0: edge(i64::from(y)), x1: far(x, width), y1: far(y, height) };
        rect.or_none()
    }

    fn or_none(self) -> Option<Self> {
        (self.x0 < self.x1 && self.y0 < self.y1).then_some(self)
    }

    /// The part inside a buffer of `width` by `height`.
    pub fn clip(self, width: u32, height: u32) -> Option<Self> {
        Self { x1: self.x1.min(width), y1: self.y1.min(height), ..self }.or_none()
    }

    fn contains(&self, other: &Self) -> bool {
        self.x0 <= other.x0 && self.y0 <= other.y0 && self.x1 >= other.x1 && self.y1 >= other.y1
    }

    fn merge(self, other: &Self) -> Self {
        Self {
            x0: self.x0.min(other.x0),
            y0: self.y0.min(other.y0),
            x1: self.x1.max(other.x1),
            y1: self.y1.max(other.y1),
        }
    }
}

/// A set of pixels, at least all that were added to it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Region {
    rects: Vec<Rect>,
}

impl Region {
    /// All there is, whatever the buffer's size.
    pub fn everything() -> Self {
        Self { rects: vec![Rect { x0: 0, y0: 0, x1: u32::MAX, y1: u32::MAX }] }
    }

    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.rects.is_empty()
    }

    /// Adds one rectangle.
    pub fn add(&mut self, rect: Rect) {
        if self.rects.iter().any(|known| known.contains(&rect)) {
            return;
        }
        self.rects.retain(|known| !rect.contains(known));
        self.rects.push(rect);
        if self.rects.len() > MAX_RECTS {
            let bounds = self.rects.iter().fold(rect, Rect::merge);
            self.rects = vec![bounds];
        }
    }

    /// Adds all of `other`.
    pub fn add_all(&mut self, other: &Self) {
        for rect in &other.rects {
            self.add(*rect);
        }
    }

    /// The rectangles, which may overlap.
    pub fn rects(&self) -> &[Rect] {
        &self.rects
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rect(x0: u32, y0: u32, x1: u32, y1: u32) -> Rect {
        Rect { x0, y0, x1, y1 }
    }

    #[test]
    fn extreme_coordinates_neither_overflow_nor_leave_the_buffer() {
        let all = Rect::new([0, 0, i32::MAX, i32::MAX], 3).unwrap();
        assert_eq!(all.clip(640, 480), Some(rect(0, 0, 640, 480)));
        let shifted = Rect::new([i32::MIN, i32::MIN, i32::MAX, i32::MAX], 2);
        assert_eq!(shifted, None, "ends left of the origin");
        assert_eq!(Rect::new([-10, -10, 30, 20], 1), Some(rect(0, 0, 20, 10)));
        assert_eq!(Rect::new([5, 5, -1, 7], 1), None);
        assert_eq!(Rect::new([5, 5, 0, 7], 1), None);
        assert_eq!(rect(700, 0, 800, 10).clip(640, 480), None);
    }

    #[test]
    fn scale_enlarges_both_edges() {
        assert_eq!(Rect::new([1, 2, 3, 4], 2), Some(rect(2, 4, 8, 12)));
    }

    #[test]
    fn contained_rectangles_are_dropped_in_either_order() {
        let mut region = Region::default();
        region.add(rect(10, 10, 20, 20));
        region.add(rect(12, 12, 14, 14));
        assert_eq!(region.rects(), [rect(10, 10, 20, 20)]);
        region.add(rect(0, 0, 30, 30));
        assert_eq!(region.rects(), [rect(0, 0, 30, 30)]);
        let mut all = Region::everything();
        all.add(rect(1, 1, 2, 2));
        assert_eq!(all, Region::everything());
    }

    #[test]
    fn many_rectangles_become_one_that_covers_them() {
        let mut region = Region::default();
        for at in 0..100 {
            region.add(rect(at * 10, at * 5, at * 10 + 2, at * 5 + 2));
            assert!(region.rects().len() <= MAX_RECTS);
        }
        for at in 0..100 {
            let part = rect(at * 10, at * 5, at * 10 + 2, at * 5 + 2);
            assert!(region.rects().iter().any(|r| r.contains(&part)), "{at} got lost");
        }
    }
}
